"""The resampler: learnt queries attend to a view's features, with sine positions on the keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F

from sensorium.kernels.cpu import threads
from sensorium.layers.linear import Linear
from sensorium.layers.norm import LayerNorm
from sensorium.models.families.minicpmv.config import HEAD_DIM, MiniCPMVConfig
from sensorium.models.families.minicpmv.vision import Size
from sensorium.models.interface import BuildOptions, Part, WeightSlot
from sensorium.models.loading.memory import owned
from sensorium.models.loading.weights import linear_slot, norm_slot

NORM_EPS = 1e-6
WAVELENGTH = 10000.0


class Resampler:
    """Resampler of views of any shape to ``num_queries`` embeddings each, of width H.

    H is the decoder's hidden size.
    """

    def __init__(self, config: MiniCPMVConfig, options: BuildOptions) -> None:
        width = config.text.hidden_size
        self.width, self.num_queries = width, config.num_queries
        self.dtype, self.device = options.dtype, options.device
        self.kv: Linear | None = None
        if config.vision.hidden_size != width:
            self.kv = Linear(config.vision.hidden_size, width)
        self.kv_norm = LayerNorm(width, NORM_EPS)
        self.k, self.v = Linear(width, width, bias=True), Linear(width, width, bias=True)
        self.o = Linear(width, width, bias=True)
        self.out_norm = LayerNorm(width, NORM_EPS)
        self.out = Linear(width, width)
        self.queries = torch.empty(0)
        self._axis = torch.empty(0)

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Slots of the weights under ``prefix``.

        Norm and projection of the queries run once, when they are loaded.
        """
        width = self.width
        parts = (
            Part(f"{prefix}query", (self.num_queries, width)),
            Part(f"{prefix}ln_q.weight", (width,)),
            Part(f"{prefix}ln_q.bias", (width,)),
            Part(f"{prefix}attn.in_proj_weight", (3 * width, width)),
            Part(f"{prefix}attn.in_proj_bias", (3 * width,)),
        )
        yield WeightSlot(parts, self._load_attention, layers=(self.k, self.v))
        if self.kv is not None:
            yield linear_slot(self.kv, [(f"{prefix}kv_proj", width)])
        yield norm_slot(self.kv_norm, f"{prefix}ln_kv")
        yield linear_slot(self.o, [(f"{prefix}attn.out_proj", width)])
        yield norm_slot(self.out_norm, f"{prefix}ln_post")
        projection = Part(f"{prefix}proj", (width, width))
        yield WeightSlot((projection,), self._load_out, layers=(self.out,))

    def _load_attention(
        self,
        query: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> None:
        q, k, v = weight.chunk(3)
        q_bias, k_bias, v_bias = map(owned, bias.chunk(3))
        with threads.single():  # a model may be loaded with other threads than it runs with
            queries = F.layer_norm(query, (self.width,), norm_weight, norm_bias, NORM_EPS)
            self.queries = self._heads(F.linear(queries, q, q_bias)[None])
        self.k.load(owned(k), k_bias)
        self.v.load(owned(v), v_bias)

    def _load_out(self, weight: torch.Tensor) -> None:
        self.out.load(weight.t().contiguous())  # the file has it for x @ weight

    def __call__(self, features: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
        """Return embeddings (V, num_queries, H) of features (P, width of the tower).

        The features are the rows of V views of these sizes.
        """
        kv = self.kv_norm(features if self.kv is None else self.kv(features))
        values = self.v(kv)
        keys = self.k(kv.add_(torch.cat([self.positions(size) for size in sizes])))
        mixed, start = [], 0
        for length, views in groupby(rows * columns for rows, columns in sizes):
            num = len(list(views))
            own = slice(start, start + num * length)
            start = own.stop
            k, v = (self._heads(x[own].view(num, length, self.width)) for x in (keys, values))
            queries = self.queries.expand(num, -1, -1, -1)
            mixed.append(F.scaled_dot_product_attention(queries, k, v, scale=HEAD_DIM**-0.5))
        heads = torch.cat(mixed) if len(mixed) > 1 else mixed[0]
        rows = heads.transpose(1, 2).reshape(-1, self.width)
        embeds = self.out(self.out_norm(self.o(rows)))
        return embeds.view(len(sizes), self.num_queries, self.width)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """Split heads: (V, L, H) -> (V, heads, L, head_dim)."""
        return x.view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)

    def positions(self, size: Size) -> torch.Tensor:
        """Return sines and cosines (rows * columns, H).

        The first half of the channels is of the column, the second of the row.
        """
        rows, columns = size
        if len(self._axis) < max(size):
            self._axis = sine_table(max(size), self.width // 2).to(self.device, self.dtype)
        across = self._axis[:columns].expand(rows, -1, -1)
        down = self._axis[:rows, None].expand(-1, columns, -1)
        return torch.cat((across, down), dim=-1).view(rows * columns, self.width)


def sine_table(length: int, width: int) -> torch.Tensor:
    """Return sine positions (length, width) float32 (Vaswani et al., 2017).

    Row m holds sines, then cosines, of m / 10000^(2 k / width).
    """
    half = width // 2
    omega = WAVELENGTH ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * omega
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()
