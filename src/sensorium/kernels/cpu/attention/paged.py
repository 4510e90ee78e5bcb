"""Paged attention of a whole step on the CPU: a plan of kernel launches that all layers share.

All rows go through the paged kernel, which gives a row the same bits however the step is made up,
and is faster than torch's flash attention on CPUs without matrix tiles. With tiles, where the batch
need not be invariant, long spans of rows (above ``SHORT_SPAN``) use these: their keys and values
are gathered and torch's flash attention runs, once over the step's own tokens (causal) and once
over the context, merged by their log-sum-exps.

Where rows do not attend to all tokens before them, a table says to which ones (``seen_tokens``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from sensorium.kernels import reference
from sensorium.kernels.batch import PLAIN, AttentionBatch, AttentionVariant, LayerCache
from sensorium.kernels.cpu import amx
from sensorium.kernels.cpu.attention.causal import PART_TOKENS, build_attend, scratch_floats
from sensorium.kernels.cpu.elementwise import kernel, launch
from sensorium.kernels.cpu.launch import Kernel, float_bits, pack
from sensorium.kernels.cpu.rotary import ROWS_PER_TASK, build_rope_write

SHORT_SPAN = 24
"""Longest span of bf16 query rows for which matrix tiles do not pay off; measured with a context
of 1000 tokens."""
PIECE_MATRIX_ROWS = 64
"""Query rows times group size of one task: bounds its scratch and makes tasks of spans."""
TASKS_PER_THREAD = 4


@dataclass(slots=True)
class Span:
    """A long run of query rows of one sequence.

    ``num_rows`` rows from ``first_row``, behind ``context`` cached tokens.
    """

    sequence: int
    first_row: int
    num_rows: int
    context: int


@dataclass(slots=True)
class AttentionPlan:
    """Plan of one step for all layers with the same head geometry; layers reuse its buffers."""

    num_pieces: int
    pieces: torch.Tensor
    partials: torch.Tensor
    done: torch.Tensor
    scratch: torch.Tensor
    scratch_stride: int
    args: Any
    attend: Kernel
    spans: list[Span]
    first_span_row: int
    row_block: torch.Tensor
    row_offset: torch.Tensor
    q_rotated: torch.Tensor
    k_rotated: torch.Tensor
    seen: torch.Tensor | None


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
    """Compute ``reference.rope_attention`` with CPU kernels.

    The cache must have qkv's dtype and a block size that is a multiple of 16.
    """
    qkv = qkv.contiguous()
    num_tokens = qkv.shape[0]
    cache = batch.caches[layer]
    # Soft caps and sinks change no plan, and windows that hold every sequence neither.
    window = variant.window
    if window is not None and batch.max_kv_len <= window:
        window = None
    key = (num_heads, num_kv_heads, head_dim, qkv.dtype, window, id(variant.bidirectional))
    plan: AttentionPlan | None = batch.scratch.get(key)
    if plan is None:
        plan = batch.scratch[key] = _plan(batch, cache, num_heads, qkv.dtype, variant)
    out = qkv.new_empty((num_tokens, num_heads * head_dim))
    norms = (
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        float_bits(norm_eps),
    )
    if plan.first_span_row < num_tokens:
        _rope_write(qkv, batch, cache, plan, num_heads, norms)
    if plan.num_pieces:
        # Only what differs between layers: the rest is in the plan's arguments.
        args = plan.args
        args[0] = args[1] = 0
        args[3] = qkv.data_ptr()
        args[6] = cache.k.data_ptr()
        args[7] = cache.v.data_ptr()
        args[11] = out.data_ptr()
        args[21] = float_bits(scale)
        args[22], args[23], args[24] = norms
        sinks = None if variant.sinks is None else variant.sinks.float().contiguous()
        args[27] = float_bits(variant.softcap or 0.0)
        args[28] = 0 if sinks is None else sinks.data_ptr()
        plan.attend(args)
    for span in plan.spans:
        _attend_span(qkv, batch, cache, plan, span, scale, out)
    return out


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: AttentionBatch,
    layer: int,
    scale: float,
    variant: AttentionVariant = PLAIN,
) -> torch.Tensor:
    """Compute ``reference.paged_attention`` with CPU kernels.

    It runs the kernels of ``rope_attention`` with no dimension to rotate.
    """
    unrotated: AttentionBatch | None = batch.scratch.get("unrotated")
    if unrotated is None:
        none = torch.empty((q.shape[0], 0))
        unrotated = replace(batch, cos=none, sin=none, scratch={})
        batch.scratch["unrotated"] = unrotated
    num_tokens, num_heads, head_dim = q.shape
    qkv = torch.cat((q, k, v), dim=1).view(num_tokens, -1)
    mixed = rope_attention(
        *(qkv, unrotated, layer, num_heads, k.shape[1], head_dim, scale), variant=variant
    )
    return mixed.view(num_tokens, num_heads, head_dim)


def _rope_write(
    qkv: torch.Tensor,
    batch: AttentionBatch,
    cache: LayerCache,
    plan: AttentionPlan,
    num_heads: int,
    norms: tuple[int, int, int],
) -> None:
    """Rotate the rows of all spans and write their keys and values."""
    _, num_kv_heads, head_dim, block_size = cache.k.shape
    num_rows = qkv.shape[0] - plan.first_span_row
    args = pack(
        -(-num_rows // ROWS_PER_TASK),
        qkv.data_ptr(),
        batch.cos.data_ptr(),
        batch.sin.data_ptr(),
        cache.k.data_ptr(),
        cache.v.data_ptr(),
        plan.q_rotated.data_ptr(),
        plan.k_rotated.data_ptr() if plan.spans else 0,
        plan.row_block.data_ptr(),
        plan.row_offset.data_ptr(),
        num_heads,
        num_kv_heads,
        head_dim,
        batch.cos.shape[1],
        block_size,
        *norms,
        plan.first_span_row,
        num_rows,
        ROWS_PER_TASK,
        plan.scratch.data_ptr(),
    )
    launch(kernel(build_rope_write, qkv.dtype), args, num_rows * qkv.shape[1])


def _attend_span(
    qkv: torch.Tensor,
    batch: AttentionBatch,
    cache: LayerCache,
    plan: AttentionPlan,
    span: Span,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Flash attention of one long span, written into its rows of ``out``."""
    _, num_kv_heads, head_dim, block_size = cache.k.shape
    num_heads = out.shape[1] // head_dim
    rows = slice(span.first_row, span.first_row + span.num_rows)
    heads = qkv[rows].view(span.num_rows, num_heads + 2 * num_kv_heads, head_dim)
    q = plan.q_rotated[rows].to(qkv.dtype).transpose(0, 1)[None]
    k = plan.k_rotated[rows].transpose(0, 1)[None]
    v = heads[:, num_heads + num_kv_heads :].transpose(0, 1)[None]
    mixed, weight = flash(q, k, v, 0.0, True, scale=scale)
    if span.context:
        num_blocks = -(-span.context // block_size)
        blocks = batch.block_table[span.sequence : span.sequence + 1, :num_blocks]
        old_k, old_v = reference.gather(cache, blocks)
        length = span.context
        old, old_weight = flash(q, old_k[:, :, :length], old_v[:, :, :length], scale=scale)
        share = torch.sigmoid(old_weight - weight)[..., None]
        mixed = torch.lerp(mixed.float(), old.float(), share)
    out[rows].view(span.num_rows, num_heads, head_dim).copy_(mixed[0].transpose(0, 1))


flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def seen_tokens(batch: AttentionBatch, variant: AttentionVariant) -> torch.Tensor | None:
    """Return the first index and the end of the tokens that each row attends to, (T, 2) int64.

    None where each row attends to its own token and all before.
    """
    window, spans = variant.window, variant.bidirectional
    if spans is None and (window is None or batch.max_kv_len <= window):
        return None
    _, position = reference.token_positions(batch)
    first = torch.zeros_like(position) if window is None else (position - window + 1).clamp_(min=0)
    end = position + 1
    if spans is not None:
        # A span holds its row, so that the union with the tokens before is an interval.
        first, end = torch.minimum(first, spans[0]), torch.maximum(end, spans[1] + 1)
    return torch.stack((first, end), dim=1)


def _plan(
    batch: AttentionBatch,
    cache: LayerCache,
    num_heads: int,
    dtype: torch.dtype,
    variant: AttentionVariant,
) -> AttentionPlan:
    # The kernels read these by address.
    batch.cos, batch.sin = batch.cos.contiguous(), batch.sin.contiguous()
    batch.block_table = batch.block_table.to(torch.int32).contiguous()
    _, num_kv_heads, head_dim, block_size = cache.k.shape
    group = num_heads // num_kv_heads
    num_threads = torch.get_num_threads()
    num_tokens = sum(batch.query_lens)
    limits: list[int | None] = [None] * len(batch.query_lens)
    if attends_with_tiles(dtype) and not batch.invariant:
        affected = set(variant.affected_sequences(batch))
        limits = [None if i in affected else SHORT_SPAN for i in range(len(limits))]
    seen = seen_tokens(batch, variant)
    pieces, spans, num_partial, num_done = plan_pieces(
        batch, num_kv_heads, group, num_threads, limits, seen
    )
    rows_of_task = max((piece[2] for piece in pieces), default=0) * group
    stride = scratch_floats(rows_of_task, head_dim) + 16
    first = batch.num_decodes
    none = torch.empty(0, dtype=torch.int64)
    row_block, row_offset = none, none
    if first < num_tokens:
        sequence, position = reference.token_positions(batch)
        sequence, position = sequence[first:], position[first:]
        row_block = batch.block_table.long()[sequence, position // block_size]
        row_offset = position % block_size
    spanned = num_tokens if first < num_tokens else 0
    plan = AttentionPlan(
        num_pieces=len(pieces),
        pieces=torch.tensor(pieces, dtype=torch.int64) if pieces else none,
        partials=torch.empty(num_partial * num_heads * (head_dim + 2)),
        done=torch.zeros(num_done * num_kv_heads, dtype=torch.int64),
        scratch=torch.empty(num_threads * stride),
        scratch_stride=stride,
        args=None,
        attend=kernel(build_attend, dtype).for_weight(
            2 * num_heads * head_dim * sum((p[5] - p[4]) * p[2] for p in pieces)
        ),
        spans=spans,
        first_span_row=first,
        row_block=row_block,
        row_offset=row_offset,
        q_rotated=torch.empty((spanned, num_heads, head_dim)),
        k_rotated=torch.empty((num_tokens if spans else 0, num_kv_heads, head_dim), dtype=dtype),
        seen=seen,
    )
    plan.args = _attend_args(batch, cache, plan, num_heads)
    return plan


def _attend_args(
    batch: AttentionBatch, cache: LayerCache, plan: AttentionPlan, num_heads: int
) -> Any:
    """Pack the arguments of ``build_attend``.

    Those that differ between layers are zero; ``rope_attention`` fills them in.
    """
    _, num_kv_heads, head_dim, block_size = cache.k.shape
    per_layer = 0
    return pack(
        plan.num_pieces * num_kv_heads,
        per_layer,
        batch.cos.data_ptr(),
        batch.sin.data_ptr(),
        per_layer,
        per_layer,
        batch.block_table.data_ptr(),
        batch.block_table.stride(0),
        plan.pieces.data_ptr(),
        per_layer,
        plan.partials.data_ptr(),
        plan.done.data_ptr(),
        plan.scratch.data_ptr(),
        plan.scratch_stride,
        num_heads,
        num_kv_heads,
        head_dim,
        batch.cos.shape[1],
        block_size,
        *(per_layer,) * 4,
        plan.q_rotated.data_ptr(),
        0 if plan.seen is None else plan.seen.data_ptr(),
        per_layer,
        per_layer,
    )


def attends_with_tiles(dtype: torch.dtype) -> bool:
    """Return whether matrix tiles may compute long spans."""
    return dtype == torch.bfloat16 and amx.available()


def plan_pieces(
    batch: AttentionBatch,
    num_kv_heads: int,
    group: int,
    num_threads: int,
    limits: Sequence[int | None],
    seen: torch.Tensor | None = None,
) -> tuple[list[list[int]], list[Span], int, int]:
    """Split a step into pieces, largest first, and spans of more rows than a sequence's limit.

    ``seen``: what ``seen_tokens`` returns. Returns the table of pieces, the spans (which are in no
    piece), and the sizes of the partial results and of ``done``. Parts of a sequence are tasks of
    their own where it is one piece and there would be too few tasks otherwise.
    """
    query_lens, num_decodes = batch.query_lens, batch.num_decodes
    rows_of_task = max(1, PIECE_MATRIX_ROWS // group)
    shares = [
        -(-n // rows_of_task) if limit is None or n <= limit else 0
        for n, limit in zip(query_lens, limits, strict=True)
    ]
    starts = [0, *accumulate(query_lens)]
    reach = _Reach(seen)
    extents = [
        reach(row, n, kv_len - n)
        for row, n, kv_len in zip(starts, query_lens, batch.kv_lens, strict=False)
    ]
    work = num_kv_heads * sum(
        (end - begin) * m for (begin, end), m in zip(extents, shares, strict=True)
    )
    longest = max(PART_TOKENS, work // (num_threads * TASKS_PER_THREAD))
    pieces: list[list[int]] = []
    spans: list[Span] = []
    num_partial = num_done = 0
    for sequence, (kv_len, query_len) in enumerate(zip(batch.kv_lens, query_lens, strict=True)):
        fresh, row = int(sequence < num_decodes), starts[sequence]
        begin, end = extents[sequence]
        if not shares[sequence]:
            spans.append(Span(sequence, row, query_len, kv_len - query_len))
        elif shares[sequence] == 1 and end - begin > longest:
            place = (sequence, row, query_len, kv_len - query_len)
            parts = range(begin, end, PART_TOKENS)
            for part, start in enumerate(parts):
                tail = (part, len(parts), num_partial, num_done, fresh)
                pieces.append([*place, start, min(start + PART_TOKENS, end), *tail])
            num_partial += len(parts) * query_len
            num_done += 1
        else:
            for offset in range(0, query_len, rows_of_task):
                num_rows = min(rows_of_task, query_len - offset)
                position = kv_len - query_len + offset
                place = (sequence, row + offset, num_rows, position)
                pieces.append([*place, *reach(row + offset, num_rows, position), 0, 1, 0, 0, fresh])
    pieces.sort(key=lambda piece: piece[4] - piece[5])
    return pieces, spans, num_partial, num_done


class _Reach:
    """The tokens that rows attend to: from the start of a part to the last one's end."""

    __slots__ = ("_ends", "_firsts")

    def __init__(self, seen: torch.Tensor | None) -> None:
        self._firsts, self._ends = ([], []) if seen is None else seen.T.tolist()

    def __call__(self, row: int, count: int, position: int) -> tuple[int, int]:
        """Return begin and end for ``count`` rows from ``row`` on, the first at ``position``."""
        if not self._ends:
            return 0, position + count
        begin = min(self._firsts[row : row + count])
        return begin - begin % PART_TOKENS, max(self._ends[row : row + count])
