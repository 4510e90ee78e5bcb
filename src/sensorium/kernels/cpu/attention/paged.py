"""Paged attention of a whole step on the CPU: a plan of kernel launches that all layers share.

All rows go through one kernel, which gives a row the same bits however the step is made up: with
matrix tiles where the CPU has them (``causal_tiles``), else with vectors (``causal``), which are
faster than torch's flash attention on CPUs without tiles. Where there are tiles that this engine's
kernel cannot be trusted with, and the batch need not be invariant, long spans of rows (above
``SHORT_SPAN``) run through flash attention: their keys and values are gathered and it runs once
over the step's own tokens (causal) and once over the context, merged by their log-sum-exps.

Where rows do not attend to all tokens before them, a table says to which ones (``seen_tokens``).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from sensorium.kernels import reference
from sensorium.kernels.batch import PLAIN, AttentionBatch, AttentionVariant, LayerCache
from sensorium.kernels.cpu import amx
from sensorium.kernels.cpu.attention import causal, pieces
from sensorium.kernels.cpu.attention.pieces import Span
from sensorium.kernels.cpu.attention.quantized import causal as quantized
from sensorium.kernels.cpu.attention.route import VECTORS, Route, choose
from sensorium.kernels.cpu.attention.tiles import causal as causal_tiles
from sensorium.kernels.cpu.elementwise import Build, kernel, launch
from sensorium.kernels.cpu.launch import (
    NUM_ARGS,
    Kernel,
    NotRecordable,
    float_bits,
    is_recording,
    pack,
    renew_last,
)
from sensorium.kernels.cpu.numeric import WIDTH
from sensorium.kernels.cpu.rotary import ROWS_PER_TASK, SCRATCH_ROWS, build_rope_write

SHORT_SPAN = 24
"""Longest span of bf16 query rows for which matrix tiles do not pay off; measured with a context
of 1000 tokens."""


@dataclass(slots=True)
class AttentionPlan:
    """Plan of one step for all layers with the same head geometry; layers reuse its buffers."""

    num_pieces: int
    pieces: torch.Tensor
    partials: torch.Tensor
    done: torch.Tensor
    num_threads: int
    """Most threads that may run: as many as have scratch."""
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
    bidirectional: torch.Tensor | None
    """Held as long as the plan, whose key has its identity."""
    most_tokens: int
    """Length of the longest sequence up to which the plan is the same but for its numbers."""


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
    route: Route | None = None,
) -> torch.Tensor:
    """Compute ``reference.rope_attention`` with CPU kernels.

    The cache must have qkv's dtype or int8, and a block size that is a multiple of 16. route: the
    kernel, by default the one of this machine.
    """
    qkv = qkv.contiguous()
    num_tokens = qkv.shape[0]
    cache = batch.caches[layer]
    plan = plan_of(batch, cache, num_heads, qkv.dtype, variant, route)
    out = qkv.new_empty((num_tokens, num_heads * head_dim))
    norms = (
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        float_bits(norm_eps),
    )
    if plan.first_span_row < num_tokens:
        _rope_write(qkv, batch, cache, plan, num_heads, norms)
        if is_recording():
            _renew_rope(cache, num_heads, qkv.dtype, variant, route)
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
        if is_recording():
            _renew_plan(cache, num_heads, qkv.dtype, variant, route)
    for span in plan.spans:
        _attend_span(qkv, batch, cache, plan, span, scale, out)
    return out


def plan_of(
    batch: AttentionBatch,
    cache: LayerCache,
    num_heads: int,
    dtype: torch.dtype,
    variant: AttentionVariant,
    route: Route | None = None,
) -> AttentionPlan:
    """Return the plan of a step for all layers like this one, made at the first."""
    # Windows that hold every sequence change no plan. Soft caps and sinks say which rows may go
    # through flash attention; their values do not matter.
    window = variant.window
    if window is not None and batch.max_kv_len <= window:
        window = None
    num_kv_heads, head_dim = cache.num_kv_heads, cache.head_dim
    if cache.records is not None:
        route = VECTORS
    elif route is None:
        route = choose(dtype, head_dim)
    others = (variant.softcap is None, variant.sinks is None, id(variant.bidirectional), route)
    key = (num_heads, num_kv_heads, head_dim, cache.dtype, window, *others)
    plan: AttentionPlan | None = batch.scratch.get(key)
    if plan is None:
        plan = batch.scratch[key] = _plan(batch, cache, num_heads, dtype, variant, route)
    if variant.window is not None and variant.window < plan.most_tokens:
        plan.most_tokens = variant.window
    return plan


_OF_LAYER = (3, 6, 7, 11, 21, 22, 23, 24, 27, 28)
"""Arguments of ``build_attend`` that a layer gives; the others are those of the plan."""
_OF_PLAN = tuple(index for index in range(NUM_ARGS) if index not in _OF_LAYER)


def _renew_plan(
    cache: LayerCache,
    num_heads: int,
    dtype: torch.dtype,
    variant: AttentionVariant,
    route: Route | None,
) -> None:
    """Tell the recording how the arguments of attention follow from the batch of a later step."""
    if variant.bidirectional is not None:
        raise NotRecordable("spans that are attended to both ways belong to one step")
    renew_last(
        (num_heads, cache.num_kv_heads, cache.head_dim, variant.window, route),
        lambda batch: plan_of(batch, cache, num_heads, dtype, variant, route).args,
        _OF_PLAN,
    )


_OF_ROPE = (4, 5, 8, 10, 11, 23)
"""Arguments of ``build_rope_write`` that follow from the batch."""


def _renew_rope(
    cache: LayerCache,
    num_heads: int,
    dtype: torch.dtype,
    variant: AttentionVariant,
    route: Route | None,
) -> None:
    """Do as ``_renew_plan`` for the rotation and the writing of keys and values."""

    def args(batch: AttentionBatch) -> Any:
        plan = plan_of(batch, cache, num_heads, dtype, variant, route)
        return _rope_args(batch, cache, plan, num_heads, qkv=0, norms=(0, 0, 0))

    key = ("rope", num_heads, cache.num_kv_heads, cache.head_dim, variant.window, route)
    renew_last(key, args, _OF_ROPE)


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
    args = _rope_args(batch, cache, plan, num_heads, qkv=qkv.data_ptr(), norms=norms)
    weight = (qkv.shape[0] - plan.first_span_row) * qkv.shape[1]
    build = build_rope_write if cache.records is None else quantized.build_rope_write
    launch(kernel(build, qkv.dtype), args, weight, plan.num_threads)


def _rope_args(
    batch: AttentionBatch,
    cache: LayerCache,
    plan: AttentionPlan,
    num_heads: int,
    *,
    qkv: int,
    norms: tuple[int, int, int],
) -> Any:
    """Pack the arguments of ``build_rope_write``; ``qkv`` is an address."""
    num_kv_heads, head_dim, block_size = cache.num_kv_heads, cache.head_dim, cache.block_size
    num_rows = batch.cos.shape[0] - plan.first_span_row
    return pack(
        -(-num_rows // ROWS_PER_TASK),
        qkv,
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
    num_kv_heads, head_dim, block_size = cache.num_kv_heads, cache.head_dim, cache.block_size
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
    route: Route,
) -> AttentionPlan:
    # The kernels read these by address.
    batch.cos, batch.sin = batch.cos.contiguous(), batch.sin.contiguous()
    batch.block_table = batch.block_table.to(torch.int32).contiguous()
    num_kv_heads, head_dim, block_size = cache.num_kv_heads, cache.head_dim, cache.block_size
    group = num_heads // num_kv_heads
    num_threads = torch.get_num_threads()
    num_tokens = sum(batch.query_lens)
    limits: list[int | None] = [None] * len(batch.query_lens)
    may_vary = not batch.invariant and cache.records is None
    if route.unit is None and may_vary and flash_pays(dtype):
        affected = set(variant.affected_sequences(batch))
        limits = [None if i in affected else SHORT_SPAN for i in range(len(limits))]
    seen = seen_tokens(batch, variant)
    most_rows = pieces.MATRIX_ROWS
    if route.unit is not None:
        most_rows = pieces.matrix_rows(
            *(batch.query_lens, num_kv_heads, group, num_threads, causal_tiles.MATRIX_ROWS)
        )
    table, spans, num_partial, num_done = pieces.plan_pieces(
        batch, num_kv_heads, group, num_threads, limits, seen, most_rows
    )
    rows_of_task = max((piece[2] for piece in table), default=0) * group
    build: Build = causal.build_attend
    stride = causal.scratch_floats(rows_of_task, head_dim)
    if route.unit is not None:
        build = amx.bound(causal_tiles.build_attend, route.unit)
        stride = causal_tiles.scratch_floats(rows_of_task, head_dim)
    if cache.records is not None:
        build = quantized.build_attend
        stride = quantized.scratch_floats(rows_of_task, head_dim)
    stride = max(stride, SCRATCH_ROWS * -(-head_dim // WIDTH) * WIDTH)
    stride = -(-stride // WIDTH) * WIDTH + WIDTH
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
        num_pieces=len(table),
        pieces=torch.tensor(table, dtype=torch.int64) if table else none,
        partials=torch.empty(num_partial * num_heads * (head_dim + 2)),
        done=torch.zeros(num_done * num_kv_heads, dtype=torch.int64),
        num_threads=num_threads,
        scratch=torch.empty(num_threads * stride),
        scratch_stride=stride,
        args=None,
        attend=kernel(build, dtype).for_weight(
            2 * num_heads * head_dim * sum((p[5] - p[4]) * p[2] for p in table), num_threads
        ),
        spans=spans,
        first_span_row=first,
        row_block=row_block,
        row_offset=row_offset,
        q_rotated=torch.empty((spanned, num_heads, head_dim)),
        k_rotated=torch.empty((num_tokens if spans else 0, num_kv_heads, head_dim), dtype=dtype),
        seen=seen,
        bidirectional=variant.bidirectional,
        most_tokens=0 if seen is not None or spans else sys.maxsize,
    )
    plan.args = _attend_args(batch, cache, plan, num_heads, route)
    return plan


def _attend_args(
    batch: AttentionBatch, cache: LayerCache, plan: AttentionPlan, num_heads: int, route: Route
) -> Any:
    """Pack the arguments of ``build_attend``.

    Those that differ between layers are zero; ``rope_attention`` fills them in.
    """
    num_kv_heads, head_dim, block_size = cache.num_kv_heads, cache.head_dim, cache.block_size
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
        route.least_rows,
    )


def flash_pays(dtype: torch.dtype) -> bool:
    """Return whether long spans run through torch's flash attention where the batch may vary.

    That is where it has matrix tiles and this engine's kernel has none that can be trusted.
    """
    return dtype == torch.bfloat16 and amx.available() and choose(dtype, amx.TILE) == VECTORS
