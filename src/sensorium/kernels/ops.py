"""Operations that layers call, dispatched to the code for each device and dtype.

On the CPU, bf16, fp16 and fp32 have kernels of their own (attention of encoders in bf16 one with
matrix tiles, where the CPU has them); everything else (other devices, other dtypes, block sizes
that are no multiple of 16) runs the plain torch of ``reference``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch

from sensorium import progress
from sensorium.kernels import reference
from sensorium.kernels.adapters import AdaptedProduct, PlainAdapted
from sensorium.kernels.batch import (
    PLAIN,
    AttentionBatch,
    AttentionVariant,
    KVCacheLayout,
    LayerCache,
)
from sensorium.kernels.cpu import amx, elementwise, graph, huge_pages, rotary
from sensorium.kernels.cpu.adapters import low_rank
from sensorium.kernels.cpu.attention import causal, paged, route, varlen_vectors
from sensorium.kernels.cpu.attention.quantized import causal as quantized
from sensorium.kernels.cpu.attention.quantized.codes import MOST_HEAD_DIM
from sensorium.kernels.cpu.attention.tiles import causal as causal_tiles
from sensorium.kernels.cpu.attention.tiles import varlen as varlen_tiles
from sensorium.kernels.cpu.decoding import advance as moving
from sensorium.kernels.cpu.decoding import choice, lookup
from sensorium.kernels.cpu.decoding.advance import steps_left as steps_left
from sensorium.kernels.cpu.graph import between_launches as between_launches
from sensorium.kernels.cpu.linear import int8, integers, levels, onednn, table
from sensorium.kernels.cpu.linear.grouped.int4 import Int4Weight
from sensorium.kernels.cpu.linear.grouped.int8 import GroupedInt8Weight
from sensorium.kernels.cpu.linear.permuted import PermutedWeight
from sensorium.kernels.cpu.numeric import WIDTH
from sensorium.kernels.weight import Multiply, PackedWeight, QuantizedTensor

Result = TypeVar("Result")
WholeSteps = graph.StepGraphs

CPU_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})


DECODER_KERNELS = (
    elementwise.build_norm,
    elementwise.build_silu_mul,
    choice.build_peaks,
    choice.build_choice,
    choice.build_doubts,
)
FLOAT_CACHE_KERNELS = (rotary.build_rope_write, causal.build_attend)
INT8_CACHE_KERNELS = (quantized.build_rope_write, quantized.build_attend)
ENCODER_KERNELS = (rotary.build_rotate, elementwise.build_quick_gelu)
VARLEN_KERNELS = (varlen_vectors.build_pack, varlen_vectors.build_attend)


def _on_cpu(x: torch.Tensor) -> bool:
    return x.is_cpu and x.dtype in CPU_DTYPES


def pack_weight(
    weight: torch.Tensor | QuantizedTensor, dtype: torch.dtype | None = None
) -> PackedWeight:
    """Pack a (N, K) weight for ``linear``.

    dtype: that of activations and results; by default the weight's, needed for a quantized one. The
    caller should drop its own reference, to save memory.
    """
    if isinstance(weight, QuantizedTensor):
        if dtype is None:
            raise ValueError("a quantized weight needs the dtype of its activations")
        return _pack_quantized(weight, dtype)
    if dtype is not None:
        weight = weight.to(dtype)
    return table.pack_weight(weight) if _on_cpu(weight) else reference.PlainWeight(weight)


def takes(weight: QuantizedTensor, dtype: torch.dtype) -> bool:
    """Return whether a product on this machine takes a quantized weight as it is.

    dtype: that of activations and results. Other weights are dequantized.
    """
    return _kind_for(weight, dtype) is not None


def _kind_for(weight: QuantizedTensor, dtype: torch.dtype) -> type[QuantizedKind] | None:
    if not (weight.values.is_cpu and dtype in CPU_DTYPES and integers.forms()):
        return None
    return next((kind for kind in QUANTIZED_KINDS if kind.takes(weight)), None)


def _pack_quantized(weight: QuantizedTensor, dtype: torch.dtype) -> PackedWeight:
    kind = _kind_for(weight, dtype)
    if kind is not None:
        return kind.pack(weight, dtype)
    return reference.DequantizedWeight(weight, pack_weight(weight.dequantized(), dtype))


QuantizedKind = int8.Int8Weight | Int4Weight | GroupedInt8Weight
QUANTIZED_KINDS: tuple[type[QuantizedKind], ...] = (int8.Int8Weight, Int4Weight, GroupedInt8Weight)
STORED_KINDS: dict[str, type[PackedWeight]] = {
    kind.__name__: kind for kind in (*QUANTIZED_KINDS, PermutedWeight)
}
"""Classes of quantized weights that ``tensors`` and ``from_tensors`` keep and restore, by name."""
QUANTIZED_BAND = 1 << 20
"""Weights that are quantized before they are packed: bounds temporary memory."""


def quantize_and_pack(
    weight: torch.Tensor,
    quantize: Callable[[torch.Tensor], torch.Tensor | QuantizedTensor],
    dtype: torch.dtype,
) -> PackedWeight:
    """Quantize a (N, K) weight and pack it for ``linear``, in bands of rows.

    quantize: treats every row by itself. dtype: that of activations and results. Beside the result,
    only a band is in memory at a time.
    """
    num_outputs, num_inputs = weight.shape
    return pack_in_bands(
        (num_outputs, num_inputs), lambda first, end: quantize(weight[first:end]), dtype
    )


def pack_in_bands(
    shape: tuple[int, int],
    read: Callable[[int, int], torch.Tensor | QuantizedTensor],
    dtype: torch.dtype,
) -> PackedWeight:
    """Pack a (N, K) weight for ``linear`` that ``read(first, end)`` gives by rows.

    dtype: that of activations and results. Beside the result, only a band is in memory at a time.
    """
    num_outputs, num_inputs = shape
    panels = max(1, QUANTIZED_BAND // (WIDTH * num_inputs))
    starts = range(0, num_outputs, panels * WIDTH)
    if len(starts) == 1:
        return pack_weight(read(0, num_outputs), dtype)

    def packed(start: int) -> PackedWeight:
        with huge_pages.short_lived():
            return pack_weight(read(start, min(start + panels * WIDTH, num_outputs)), dtype)

    first = packed(0)
    kind = STORED_KINDS.get(type(first).__name__)
    if kind is None:
        return pack_weight(read(0, num_outputs), dtype)
    parts = first.tensors()
    num_panels = -(-num_outputs // WIDTH)
    whole = {
        name: huge_pages.shared_zeros(
            (part.shape[0] // panels * num_panels, *part.shape[1:]), part.dtype
        )
        for name, part in parts.items()
    }
    places = dict.fromkeys(whole, 0)
    for start in starts:
        parts = parts if start == 0 else packed(start).tensors()
        for name, part in parts.items():
            whole[name][places[name] : places[name] + part.shape[0]] = part
            places[name] += part.shape[0]
    return kind.from_tensors(whole, shape, dtype)


def permuted(weight: PackedWeight, order: torch.Tensor) -> PackedWeight:
    """Return a packed weight (N, K) whose column j belongs to input ``order[j]``.

    weight: of int4, or of int8 in groups. order: (K,) int32, each input once.
    """
    return PermutedWeight(weight, order)


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    act: str | None = None,
) -> torch.Tensor:
    """Compute ``act(x W^T + bias)``: (T, K) -> (T, N).

    act: a key of ``reference.ACTIVATIONS``, or None.
    """
    return weight.bind(bias, act)(x)


def bind_linear(
    weight: PackedWeight, bias: torch.Tensor | None, act: str | None = None
) -> Multiply:
    """Return ``linear`` bound to one weight, as a layer calls it in every step."""
    return weight.bind(bias, act)


def adapted_product(
    num_inputs: int, num_outputs: int, num_lanes: int, dtype: torch.dtype, device: torch.device
) -> AdaptedProduct:
    """Return the place for the low-rank adapters of a layer, in lanes 0 to ``num_lanes - 1``."""
    if device.type == "cpu" and dtype in CPU_DTYPES:
        return low_rank.CpuAdapted(num_inputs, num_outputs, num_lanes, dtype)
    return PlainAdapted(num_inputs, dtype, device)


def rotate_heads(
    rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, head_dim: int
) -> None:
    """Rotate the first ``num_heads`` heads of each row (T, width) in place.

    cos, sin: (T, R/2) float32.
    """
    if _on_cpu(rows) and rows.is_contiguous():
        rotary.rotate_heads(rows, cos.contiguous(), sin.contiguous(), num_heads, head_dim)
    else:
        reference.rotate_heads(rows, cos, sin, num_heads, head_dim)


def bind_norm(weight: torch.Tensor, eps: float) -> elementwise.NormFunctions:
    """Return ``rms_norm(x)`` and ``add_rms_norm(residual, x)`` bound to one weight.

    A layer calls them in every step. x and residual are (T, H), contiguous, of the weight's dtype
    and device.
    """
    if _on_cpu(weight):
        return elementwise.bind_norm(weight, eps)
    return (
        lambda x: reference.rms_norm(x, weight, eps),
        lambda residual, x: reference.add_rms_norm(residual, x, weight, eps),
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last axis: (T, H) -> (T, H)."""
    if x.dtype != weight.dtype:
        return reference.rms_norm(x, weight, eps)
    return bind_norm(weight, eps)[0](x.contiguous())


def add_rms_norm(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add ``x`` to ``residual`` in place and return the norm of the sum. All (T, H)."""
    if not (x.dtype == weight.dtype == residual.dtype and residual.is_contiguous()):
        return reference.add_rms_norm(residual, x, weight, eps)
    return bind_norm(weight, eps)[1](residual, x.contiguous())


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up of (T, 2 I), the gate in the first half -> (T, I)."""
    if _on_cpu(gate_up):
        return elementwise.silu_mul(gate_up.contiguous())
    return reference.silu_mul(gate_up)


def _has_kernel(x: torch.Tensor, cache: LayerCache) -> bool:
    """Return whether attention of rows x to a cache has a kernel."""
    if not (_on_cpu(x) and has_block_size(cache.block_size)):
        return False
    if cache.records is not None:
        return cache.head_dim <= MOST_HEAD_DIM
    return cache.dtype == x.dtype


def rope_attention(
    qkv: torch.Tensor,
    batch: AttentionBatch,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    variant: AttentionVariant = PLAIN,
) -> torch.Tensor:
    """Run optional per-head norm, rotary, cache write and paged causal attention of one layer.

    qkv (T, C): q, k, v heads of each row side by side. q_norm, k_norm (head_dim,) or None. Keys and
    values of all rows are written into ``batch.caches[layer]``. ``variant``: the differences from
    plain causal attention. Returns (T, num_heads * head_dim).
    """
    cache = batch.caches[layer]
    run: Callable[..., torch.Tensor] = reference.rope_attention
    if _has_kernel(qkv, cache):
        run = paged.rope_attention
    heads = (num_heads, num_kv_heads, head_dim)
    return run(qkv, batch, layer, *heads, scale, q_norm, k_norm, norm_eps, variant)


def runs_well(dtype: torch.dtype) -> bool:
    """Return whether this CPU runs models in ``dtype`` about as fast as in float32, or faster."""
    return table.runs_well(dtype)


def has_units(dtype: torch.dtype) -> bool:
    """Return whether this CPU has multiply instructions for ``dtype``, not slow emulation."""
    return onednn.has_units(dtype)


def has_own_product(dtype: torch.dtype) -> bool:
    """Return whether weights of ``dtype`` run through this engine's own product on this CPU."""
    return table.is_own(dtype)


def has_integer_products() -> bool:
    """Return whether this CPU runs the products of int8 and int4 weights."""
    return bool(integers.forms())


def step_runner(run: graph.Run[torch.Tensor], device: torch.device) -> graph.Run[torch.Tensor]:
    """Return ``run(embeds, batch)`` of a decoder, with launches of small steps replayed together.

    Its result is valid until the next step.
    """
    return graph.StepGraphs(run) if _replays(device) else run


def whole_steps(
    run: graph.Run[Result], device: torch.device, dtype: torch.dtype
) -> WholeSteps[Result] | None:
    """Return ``run(rows, batch)`` of whole decode steps, replayed; None where that is not done."""
    return graph.StepGraphs(run) if _replays(device) and dtype in CPU_DTYPES else None


def advance(batch: AttentionBatch) -> bool:
    """Make the batch of a decode step that has run that of the next one, a token later each.

    Returns False, with nothing changed, where it has to be made from the start. The caller writes
    the rotary factors and new blocks into its tensors, which stay where they are.
    """
    return moving.advance(batch)


def _replays(device: torch.device) -> bool:
    return device.type == "cpu" and levels.is_x86()


def bind_look_up(table: object, num_ids: int) -> lookup.LookUp | None:
    """Return the look-up of ids (T,) int64, contiguous, in a table of embeddings (N, K).

    Ids from ``num_ids`` on give its last row. None: there is no kernel for such a table.
    """
    return lookup.bind(table, num_ids) if levels.is_x86() else None


def choose_tokens(logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return what ``argmax`` and ``doubtful_rows`` find, in one number a row: (N,) int64.

    It is the index of the largest logit, or -1 minus it for a doubtful row. logits (N, V) and
    hidden (N, H) are on the CPU, contiguous and of one of its dtypes.
    """
    return choice.argmax(logits, choice.find_doubts(logits, hidden))


def products() -> str:
    """Describe in one line which products linear layers on this CPU run through."""
    return table.summary()


def has_block_size(block_size: int) -> bool:
    """Return whether the CPU kernels of paged attention take blocks of so many tokens."""
    return block_size % 16 == 0


def has_faster_variant(dtype: torch.dtype) -> bool:
    """Return whether long prompts may run faster where the batch need not be invariant."""
    return paged.flash_pays(dtype)


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: AttentionBatch,
    layer: int,
    scale: float,
    variant: AttentionVariant = PLAIN,
) -> torch.Tensor:
    """Write keys and values to the cache and run paged attention of one layer.

    q (T, num_heads, D), k and v (T, num_kv_heads, D) carry their positions already; keys and values
    of all rows are written into ``batch.caches[layer]``. ``variant``: the differences from plain
    causal attention. Returns (T, num_heads, D).
    """
    cache = batch.caches[layer]
    if _has_kernel(q, cache):
        return paged.paged_attention(q, k, v, batch, layer, scale, variant)
    return reference.paged_attention(q, k, v, batch, layer, scale, variant)


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: Sequence[int], scale: float
) -> torch.Tensor:
    """Full attention of q, k, v (T, heads, D) within each segment -> (T, heads, D).

    cu_seqlens: first row of each segment, and T at the end. Raises ValueError for anything else.
    """
    ordered = all(start <= end for start, end in pairwise(cu_seqlens))
    if not (cu_seqlens and cu_seqlens[0] == 0 and cu_seqlens[-1] == q.shape[0] and ordered):
        raise ValueError(f"segments {list(cu_seqlens)} do not cover {q.shape[0]} rows in order")
    if varlen_tiles.fits(q, k, v):
        return varlen_tiles.varlen_attention(q, k, v, cu_seqlens, scale)
    if varlen_vectors.fits(q, k, v):
        return varlen_vectors.varlen_attention(q, k, v, cu_seqlens, scale)
    if _on_cpu(q) and not has_units(q.dtype):
        # torch would multiply 16-bit numbers one by one.
        wide = reference.varlen_attention(q.float(), k.float(), v.float(), cu_seqlens, scale)
        return wide.to(q.dtype)
    return reference.varlen_attention(q, k, v, cu_seqlens, scale)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index (N,) int64 of the largest logit of each row (N, V), the first of equals."""
    if _on_cpu(logits):
        return choice.argmax(logits.contiguous())
    return reference.argmax(logits)


def doubtful_rows(logits: torch.Tensor, hidden: torch.Tensor) -> list[int]:
    """Indexes of rows that are not finite in logits (N, V) or hidden states (N, H).

    Rows whose first and last logit are equal are among them, too: all of theirs may be.
    """
    if _on_cpu(logits) and logits.dtype == hidden.dtype:
        return choice.doubtful_rows(logits.contiguous(), hidden.contiguous())
    return reference.doubtful_rows(logits, hidden)


def allocate_cache(
    layout: KVCacheLayout, num_blocks: int, device: torch.device
) -> list[LayerCache]:
    """Allocate zeroed K and V tensors of ``num_blocks`` blocks for every layer.

    On a CPU, memory is committed as blocks are written. Raises MemoryError when the system cannot
    reserve as much.
    """
    keys, values = layout.shapes

    def tensor(*shape: int) -> torch.Tensor:
        if torch.device(device).type == "cpu":
            return huge_pages.zeros(shape, layout.dtype)
        return torch.zeros(shape, dtype=layout.dtype, device=device)

    return [
        LayerCache(tensor(num_blocks, *keys), tensor(num_blocks, *values), layout.records)
        for _ in range(layout.num_layers)
    ]


def warm_up(
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    encoders: bool = True,
    stopped: Callable[[], bool] = lambda: False,
    int8_cache: bool = False,
) -> float:
    """Compile or load every kernel for ``dtype``, so that the first request does not wait.

    Returns the seconds that it took. encoders: include the kernels of vision and audio towers.
    stopped: asked before each kernel; no more are made then. int8_cache: make attention
    for a KV cache in int8 in place of that in ``dtype``. Does nothing where no kernels are used.
    """
    start = time.perf_counter()
    builds: tuple[elementwise.Build, ...] = ()
    if torch.device(device).type == "cpu" and dtype in CPU_DTYPES:
        builds = DECODER_KERNELS + (INT8_CACHE_KERNELS if int8_cache else FLOAT_CACHE_KERNELS)
        builds += ENCODER_KERNELS if encoders else ()
        unit = amx.unit() if dtype == torch.bfloat16 else None
        if unit is not None and not int8_cache:
            builds += (amx.bound(causal_tiles.build_attend, unit),)
        if encoders:
            builds += VARLEN_KERNELS
        if encoders and unit is not None:
            builds += (varlen_tiles.build_pack, amx.bound(varlen_tiles.build_attend, unit))
    with progress.bar("Preparing CPU kernels", len(builds) or None, unit="kernels") as shown:
        for build in builds:
            if stopped():
                return time.perf_counter() - start
            elementwise.kernel(build, dtype)
            shown.update()
        if builds:
            table.warm_up(dtype)
            if not int8_cache:
                route.choose(dtype, amx.TILE)  # compares tiles with vectors the first time
            if encoders and dtype == torch.bfloat16:
                varlen_tiles.trusted_unit()
            if levels.is_x86():
                graph.replay_kernel()
                moving.advance_kernel()
    return time.perf_counter() - start
