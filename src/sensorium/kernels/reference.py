"""Plain PyTorch versions of every kernel: the CUDA path, and the reference for the CPU kernels.

Shape letters: T tokens of the step, S sequences, H hidden size, C channels of the fused QKV
projection, D head size, G query heads per KV head, L tokens with KV, N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

from sensorium.kernels.batch import PLAIN, AttentionBatch, AttentionVariant, LayerCache
from sensorium.kernels.weight import Multiply, PackedWeight, QuantizedTensor


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Compute x * sigmoid(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


_gelu_tanh = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
"""Activation functions by the names that model configurations use."""


class PlainWeight(PackedWeight):
    """Weight as a plain (N, K) tensor, whose product is torch's."""

    is_copy = False

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.num_outputs, self.num_inputs = data.shape
        self.dtype = data.dtype
        self.format = str(data.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def bind(self, bias: torch.Tensor | None = None, act: str | None = None) -> Multiply:
        data = self.data
        if act is None:
            return lambda x: F.linear(x, data, bias)
        activate = ACTIVATIONS[act]
        return lambda x: activate(F.linear(x, data, bias))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids.to(self.data.device), self.data)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"data": self.data}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> PlainWeight:
        if tuple(tensors["data"].shape) != shape or tensors["data"].dtype != dtype:
            raise ValueError(f"the plain weight is not {shape} in {dtype}")
        return cls(tensors["data"])


class DequantizedWeight(PackedWeight):
    """Quantized weight whose product is that of the dequantized numbers.

    It serves where no kernel reads the quantized ones, and takes the memory of ``inner``.
    """

    def __init__(self, quantized: QuantizedTensor, inner: PackedWeight) -> None:
        self.quantized, self.inner = quantized, inner
        self.num_outputs, self.num_inputs = inner.shape
        self.dtype = inner.dtype
        self.format = quantized.format

    @property
    def nbytes(self) -> int:
        return self.quantized.nbytes + self.inner.nbytes

    def bind(self, bias: torch.Tensor | None = None, act: str | None = None) -> Multiply:
        return self.inner.bind(bias, act)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.quantized.rows(ids).to(self.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        names = ("values", "scales", "zeros", "minimums")
        found = {name: getattr(self.quantized, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def quantized_linear(
    x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute x W^T + bias in float32 with the dequantized W: (T, K) -> (T, N) float32."""
    return F.linear(x.float(), weight.dequantized(), None if bias is None else bias.float())


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last axis, in float32: x / sqrt(mean(x^2) + eps) * weight."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add ``x`` to ``residual`` in place and return the norm of the sum. All (T, H)."""
    residual.add_(x)
    return rms_norm(residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up of (T, 2 I), the gate in the first half -> (T, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index (N,) int64 of the largest logit of each row (N, V), the first of equals."""
    return logits.argmax(dim=-1)


def doubtful_rows(logits: torch.Tensor, hidden: torch.Tensor) -> list[int]:
    """Indexes of rows that are not finite in logits (N, V) or hidden states (N, H).

    Rows whose first and last logit are equal are among them, too: all of theirs may be.
    """
    finite = torch.isfinite(hidden).all(-1) & torch.isfinite(logits).all(-1)
    rows: list[int] = (~finite | (logits[:, 0] == logits[:, -1])).nonzero()[:, 0].tolist()
    return rows


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary embedding (rotate-half) to (T, heads, D) by cos, sin (T, R/2), in float32.

    The first R dimensions of each head are rotated. Su et al., RoFormer (2021), with the pairing
    (d, d + R/2) that Hugging Face checkpoints use.
    """
    half = cos.shape[1]
    wide = x.float()
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    c, s = cos[:, None], sin[:, None]
    return torch.cat((first * c - second * s, second * c + first * s, rest), dim=-1).to(x.dtype)


def rotate_heads(
    rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, head_dim: int
) -> None:
    """Rotate the first ``num_heads`` heads of rows (T, width) in place.

    cos, sin as in ``rotate``.
    """
    heads = rows[:, : num_heads * head_dim].view(rows.shape[0], num_heads, head_dim)
    heads.copy_(rotate(heads, cos, sin))


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
    """Run optional per-head norm, rotary, cache write and paged causal attention.

    qkv (T, C) -> (T, num_heads * D).
    """
    num_tokens = qkv.shape[0]
    heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm is not None:
        q = rms_norm(q, q_norm, norm_eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, norm_eps)
    q, k = rotate(q, batch.cos, batch.sin), rotate(k, batch.cos, batch.sin)
    mixed = paged_attention(q, k, v, batch, layer, scale, variant)
    return mixed.reshape(num_tokens, num_heads * head_dim)


def token_positions(batch: AttentionBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequence (T,) and the index within its sequence (T,) of each row, int64."""
    device = batch.query_start.device
    starts = batch.query_start.long()
    lens = starts[1:] - starts[:-1]
    num_tokens = sum(batch.query_lens)
    sequence = torch.repeat_interleave(
        torch.arange(len(batch.query_lens), device=device), lens, output_size=num_tokens
    )
    row = torch.arange(num_tokens, device=device)
    return sequence, batch.kv_len.long()[sequence] - starts[1:][sequence] + row


def write_cache(k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch, cache: LayerCache) -> None:
    """Store k, v (T, num_kv_heads, D) of the step's tokens in the cache's blocks."""
    block_size = cache.block_size
    sequence, position = token_positions(batch)
    block = batch.block_table.long()[sequence, position // block_size]
    offset = position % block_size
    if cache.records is not None:
        cache.records.write(k, v, cache.k, cache.v, block, offset)
        return
    cache.k[block, :, :, offset] = k
    cache.v[block, :, offset] = v


def gather(
    cache: LayerCache, blocks: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather K and V (S, num_kv_heads, B * block_size, D) from the blocks (S, B) of the cache.

    Those of a cache in int8 are in ``dtype``, by default float32, and its keys as they were
    transformed (``int8_cache``).
    """
    num_sequences, num_blocks = blocks.shape
    num_kv_heads, head_dim, block_size = cache.num_kv_heads, cache.head_dim, cache.block_size
    length = num_blocks * block_size
    index = blocks.reshape(-1).long()
    shape = (num_sequences, num_kv_heads, length, head_dim)
    if cache.records is not None:
        k, v = (
            each.unflatten(0, (num_sequences, num_blocks)).transpose(1, 2).reshape(shape)
            for each in cache.records.read(cache.k, cache.v, index, dtype or torch.float32)
        )
        return k, v
    k = cache.k[index].view(num_sequences, num_blocks, num_kv_heads, head_dim, block_size)
    v = cache.v[index].view(num_sequences, num_blocks, num_kv_heads, block_size, head_dim)
    # A single block would be reshaped to a view whose last axis has gaps, which attention kernels
    # do not take.
    k = k.permute(0, 2, 1, 4, 3).reshape(shape).contiguous()
    return k, v.permute(0, 2, 1, 3, 4).reshape(shape)


def attend(q: torch.Tensor, batch: AttentionBatch, cache: LayerCache, scale: float) -> torch.Tensor:
    """Causal attention of q (T, num_heads, D) to the cached tokens of its sequence.

    The result has the shape of q.
    """
    block_size = cache.block_size
    num_decodes = batch.num_decodes
    parts = []
    if num_decodes:
        num_blocks = -(-max(batch.kv_lens[:num_decodes]) // block_size)
        blocks = batch.block_table[:num_decodes, :num_blocks]
        k, v = gather(cache, blocks, q.dtype)
        seen = torch.arange(k.shape[2], device=q.device) < batch.kv_len[:num_decodes, None]
        for gathered in (k, v):
            # Behind the end there may be values of another sequence: a NaN among them would stay a
            # NaN even times zero.
            gathered.masked_fill_(~seen[:, None, :, None], 0.0)
        out = F.scaled_dot_product_attention(
            q[:num_decodes, :, None], k, v, seen[:, None, None], scale=scale, enable_gqa=True
        )
        parts.append(out[:, :, 0])
    row = num_decodes
    for index in range(num_decodes, len(batch.query_lens)):
        query_len, kv_len = batch.query_lens[index], batch.kv_lens[index]
        num_blocks = -(-kv_len // block_size)
        blocks = batch.block_table[index : index + 1, :num_blocks]
        k, v = gather(cache, blocks, q.dtype)
        own = q[row : row + query_len].transpose(0, 1)[None]
        first = kv_len - query_len
        position = torch.arange(first, kv_len, device=q.device)
        seen = torch.arange(kv_len, device=q.device) <= position[:, None]
        out = F.scaled_dot_product_attention(
            own, k[:, :, :kv_len], v[:, :, :kv_len], seen, scale=scale, enable_gqa=True
        )
        parts.append(out[0].transpose(0, 1))
        row += query_len
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: AttentionBatch,
    layer: int,
    scale: float,
    variant: AttentionVariant = PLAIN,
) -> torch.Tensor:
    """Write keys and values to the cache and run paged attention.

    q (T, num_heads, D), k and v (T, num_kv_heads, D). The result has the shape of q.
    """
    cache = batch.caches[layer]
    write_cache(k, v, batch, cache)
    if cache.records is not None:
        q = cache.records.for_scores(q)
    if variant.is_plain(batch.max_kv_len):
        return attend(q, batch, cache, scale)
    starts = accumulate(batch.query_lens[:-1], initial=0)
    parts = [
        _attend_variant(q, row, index, batch, cache, scale, variant)
        for index, row in enumerate(starts)
    ]
    return torch.cat(parts)


def _attend_variant(
    q: torch.Tensor,
    row: int,
    index: int,
    batch: AttentionBatch,
    cache: LayerCache,
    scale: float,
    variant: AttentionVariant,
) -> torch.Tensor:
    """Attention of sequence ``index``, whose rows begin at ``row``: (n, num_heads, D).

    q is (T, num_heads, D). Blocks before every row's window are not read.
    """
    query_len, kv_len = batch.query_lens[index], batch.kv_lens[index]
    rows = slice(row, row + query_len)
    block_size, window = cache.block_size, variant.window
    spans = None if variant.bidirectional is None else variant.bidirectional[:, rows]
    first = 0
    if window is not None and spans is None:
        first = max(0, kv_len - query_len - window + 1) // block_size
    blocks = batch.block_table[index : index + 1, first : -(-kv_len // block_size)]
    start = first * block_size
    keys, values = (t[0, :, : kv_len - start].float() for t in gather(cache, blocks))
    own = torch.arange(kv_len - query_len, kv_len, device=q.device)[:, None]
    place = torch.arange(start, kv_len, device=q.device)
    seen = place <= own
    if window is not None:
        seen &= place > own - window
    if spans is not None:
        seen |= (place >= spans[0, :, None]) & (place <= spans[1, :, None])
    grouped = q[rows].float().view(query_len, keys.shape[0], -1, q.shape[2])
    scores = torch.einsum("nhgd,hkd->hgnk", grouped, keys) * scale
    if variant.softcap is not None:
        scores = variant.softcap * torch.tanh(scores / variant.softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if variant.sinks is not None:
        extra = variant.sinks.float().view(*scores.shape[:2], 1, 1).expand(-1, -1, query_len, 1)
        weights = torch.cat((scores, extra), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    mixed = torch.einsum("hgnk,hkd->nhgd", weights, values)
    return mixed.reshape(query_len, *q.shape[1:]).to(q.dtype)


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: Sequence[int], scale: float
) -> torch.Tensor:
    """Attention of q, k, v (T, heads, D) within each segment.

    Consecutive segments of equal length run as one batch.
    """
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    parts, index = [], 0
    while index < len(lengths):
        length, stop = lengths[index], index
        while stop < len(lengths) and lengths[stop] == length:
            stop += 1
        rows = slice(cu_seqlens[index], cu_seqlens[stop])
        shape = (stop - index, length, *q.shape[1:])
        own = [t[rows].reshape(shape).transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(own[0], own[1], own[2], scale=scale)
        parts.append(out.transpose(1, 2).reshape(-1, *q.shape[1:]))
        index = stop
    if not parts:
        return torch.empty_like(q)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
