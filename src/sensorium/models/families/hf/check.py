"""Checks of a model of transformers before it serves: chunks must equal its own forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch, KVCacheLayout, LayerCache
from sensorium.models.families.hf import attention

BLOCK_SIZE = 16
STEPS = (((7, 0, 4), (5, 0, 3)), ((5, 3, 1), (7, 4, 2)), ((7, 6, 1), (5, 4, 1)))
"""Steps of two sequences, each (length, tokens computed before, tokens computed now), single
tokens first."""
LENGTHS = (7, 5)
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.25}
"""Mean error, relative to the mean size: what rounding makes is far below, what a missing state
makes far above."""

IN_PIECES = (
    "when a text is computed in pieces: it remembers something besides keys and values, or attends "
    "otherwise than its configuration says"
)
WITH_MEDIA = (
    "in a prompt with media: it attends to these, or numbers their tokens, in a way of its own"
)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Head geometry of a decoder's layers.

    The number of KV heads is the same in all; keys and values are padded to one size.
    """

    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Whole:
    """Results of the model's own forward pass over one sequence.

    (T, H), (T, V), and its position ids or None.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    positions: torch.Tensor | None


def measure(decoder: Any, embeds: torch.Tensor, num_layers: int) -> Geometry:
    """Run (T, H) through the decoder and record the calls of attention.

    Raises UnfitError unless these are the keys and values of each of ``num_layers`` layers once,
    all of one shape.
    """
    step = attention.Step(None)
    with attention.running(step):
        _decode(decoder, embeds, torch.arange(len(embeds), device=embeds.device)[None])
    if not step.layers:
        raise attention.UnfitError(
            "its layers do not call the attention interface of transformers, or have no attention "
            "at all"
        )
    if sorted(step.layers) != list(range(num_layers)):
        raise attention.UnfitError(
            f"attention was called by the layers {step.layers}, not once by each of {num_layers}"
        )
    shapes = set(step.shapes)
    if len(shapes) != 1:
        raise attention.UnfitError(
            "its layers differ in KV heads or their size: (heads, keys, values) are "
            + ", ".join(map(str, sorted(shapes)))
        )
    heads, key_dim, value_dim = shapes.pop()
    return Geometry(heads, max(key_dim, value_dim))


def run_whole(inner: Any, decoder: Any, **inputs: torch.Tensor) -> Whole:
    """Run the model's own forward pass over one sequence, with its decoder's current attention."""
    found: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        found["positions"], found["hidden"] = kwargs.get("position_ids"), out.last_hidden_state

    hook = decoder.register_forward_hook(note, with_kwargs=True)
    try:
        out = inner(**inputs, use_cache=False)
    finally:
        hook.remove()
    if "hidden" not in found:
        raise attention.UnfitError("its forward pass goes around its decoder")
    return Whole(found["hidden"][0], out.logits[0], found["positions"])


def first_position(whole: Whole) -> int:
    """Return the number that the model gives to the first token.

    Raises UnfitError unless it counts up from there.
    """
    if whole.positions is None:
        return 0
    rows = whole.positions.reshape(-1, whole.positions.shape[-1])
    first = int(rows[0, 0])
    expected = torch.arange(first, first + rows.shape[1], device=rows.device)
    if not bool((rows == expected).all()):
        raise attention.UnfitError("it does not number the tokens of a text one after the other")
    return first


def check_pieces(model: Any, wholes: Sequence[Whole], embeds: Sequence[torch.Tensor]) -> None:
    """Compare two sequences run in pieces, side by side, with the results of each as a whole.

    Raises UnfitError. ``model`` is an ``HfModel``; the sequences have the lengths of ``STEPS``.
    """
    caches = _caches(model, len(wholes))
    index = {len(rows): number for number, rows in enumerate(embeds)}
    for spans in STEPS:
        kv_lens = [before + num for _, before, num in spans]
        place = torch.cat([torch.arange(before, before + num) for _, before, num in spans])
        table = [[index[length]] for length, _, _ in spans]
        nums = [num for _, _, num in spans]
        batch = _batch(model, caches, nums, kv_lens, table, place)
        rows = [embeds[index[length]][before : before + num] for length, before, num in spans]
        hidden = model.forward(torch.cat(rows), batch)
        logits = model.logits(hidden).float()
        row = 0
        for length, before, num in spans:
            whole, own = wholes[index[length]], slice(row, row + num)
            part = slice(before, before + num)
            _compare("hidden states", hidden[own], whole.hidden[part], model.dtype, IN_PIECES)
            _compare("logits", logits[own], whole.logits[part], model.dtype, IN_PIECES)
            row += num


def check_media(model: Any, whole: Whole, embeds: torch.Tensor, positions: torch.Tensor) -> None:
    """Compare a sequence (T, H) with media, run in one piece, with the model's own result.

    Raises UnfitError. positions: (T,) or (3, T), as ``HfModel.rotary`` takes them.
    """
    num = len(embeds)
    num_blocks = -(-num // BLOCK_SIZE)
    table = [list(range(num_blocks))]
    batch = _batch(model, _caches(model, num_blocks), [num], [num], table, positions)
    hidden = model.forward(embeds, batch)
    _compare("hidden states", hidden, whole.hidden, model.dtype, WITH_MEDIA)


def _caches(model: Any, num_blocks: int) -> list[LayerCache]:
    shape = model.shape
    layout = KVCacheLayout(
        shape.num_layers, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE, model.dtype
    )
    return ops.allocate_cache(layout, num_blocks, model.device)


def _batch(
    model: Any,
    caches: list[LayerCache],
    nums: list[int],
    kv_lens: list[int],
    table: list[list[int]],
    positions: torch.Tensor,
) -> AttentionBatch:
    cos, sin = model.rotary(positions.to(model.device))
    return AttentionBatch(
        query_start=_int32([0, *itertools.accumulate(nums)], model.device),
        kv_len=_int32(kv_lens, model.device),
        block_table=_int32(table, model.device),
        num_decodes=sum(num == 1 for num in nums),
        max_query_len=max(nums),
        max_kv_len=max(kv_lens),
        cos=cos,
        sin=sin,
        caches=caches,
        query_lens=nums,
        kv_lens=kv_lens,
    )


def _compare(
    what: str, found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, when: str
) -> None:
    if found.shape != wanted.shape:
        raise attention.UnfitError(
            f"its {what} are {tuple(found.shape)}, not {tuple(wanted.shape)}"
        )
    error = (found.float() - wanted.float()).abs().mean() / wanted.float().abs().mean()
    if not float(error) <= TOLERANCE[dtype]:
        raise attention.UnfitError(f"its {what} differ by {float(error):.1%} {when}")


def _decode(decoder: Any, embeds: torch.Tensor, positions: torch.Tensor) -> Any:
    return decoder(inputs_embeds=embeds[None], position_ids=positions, use_cache=False)


def _int32(values: Any, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
