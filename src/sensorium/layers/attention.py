"""Attention of decoders (paged, causal) and of encoders (full, over segments)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sensorium.kernels import ops
from sensorium.kernels.batch import PLAIN, AttentionBatch, AttentionVariant
from sensorium.layers.linear import Linear
from sensorium.layers.norm import RMSNorm


class Attention:
    """Causal self-attention with grouped KV heads over the paged cache.

    ``qkv`` holds the rows of q, then k, then v; ``q_norm`` and ``k_norm`` are per-head RMS norms
    (Qwen3) or None. ``window``: tokens that a row attends to, its own among them; None for all.
    """

    __slots__ = (
        "head_dim",
        "k_norm",
        "norm_eps",
        "num_heads",
        "num_kv_heads",
        "o",
        "q_norm",
        "qkv",
        "scale",
        "variant",
    )

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        scale: float | None = None,
        window: int | None = None,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qkv = Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, qkv_bias)
        self.o = Linear(num_heads * head_dim, hidden_size, o_bias)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.norm_eps = norm_eps
        self.scale = head_dim**-0.5 if scale is None else scale
        self.variant = PLAIN if window is None else AttentionVariant(window)

    def forward(self, x: torch.Tensor, batch: AttentionBatch, layer: int) -> torch.Tensor:
        """Run (T, hidden_size) -> (T, hidden_size).

        Writes K and V of the rows into ``batch.caches[layer]``.
        """
        mixed = ops.rope_attention(
            self.qkv(x),
            batch,
            layer,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.scale,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.norm_eps,
            self.variant,
        )
        return self.o(mixed)

    __call__ = forward


class VisionAttention:
    """Full (not causal) self-attention within segments of a ragged batch.

    ``qkv`` holds q, k, v rows in that order.
    """

    __slots__ = ("head_dim", "num_heads", "o", "qkv", "scale")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        o_bias: bool = True,
    ) -> None:
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.qkv = Linear(hidden_size, 3 * num_heads * self.head_dim, qkv_bias)
        self.o = Linear(num_heads * self.head_dim, hidden_size, o_bias)
        self.scale = self.head_dim**-0.5

    def forward(
        self,
        x: torch.Tensor,
        cu_seqlens: Sequence[int],
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run (T, hidden_size) -> (T, hidden_size).

        cu_seqlens: first row of each segment, and T at the end. cos, sin (T, rotary_dim / 2)
        float32: rotary factors of each row (both axes side by side for two-dimensional rotary), or
        None.
        """
        num_tokens = x.shape[0]
        mixed = self.qkv(x)
        if cos is not None and sin is not None:
            ops.rotate_heads(mixed, cos, sin, 2 * self.num_heads, self.head_dim)
        q, k, v = mixed.view(num_tokens, 3, self.num_heads, self.head_dim).unbind(1)
        mixed = ops.varlen_attention(q, k, v, cu_seqlens, self.scale)
        return self.o(mixed.reshape(num_tokens, -1))

    __call__ = forward
