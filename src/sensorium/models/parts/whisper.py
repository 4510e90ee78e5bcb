"""The encoder of Whisper (Radford et al., 2022) over a batch of chunks without padding.

Chunks may have any length up to the encoder's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from sensorium.kernels import ops
from sensorium.kernels.weight import PackedWeight
from sensorium.layers.linear import Linear
from sensorium.layers.mlp import PlainMLP
from sensorium.layers.norm import LayerNorm
from sensorium.models.configs import WhisperConfig
from sensorium.models.interface import BuildOptions, Packed, Part, WeightSlot
from sensorium.models.loading.memory import owned
from sensorium.models.loading.weights import linear_slot, norm_slot

KERNEL = 3
NORM_EPS = 1e-5
_HALF_LIMIT = torch.finfo(torch.float16).max - 1000


@dataclass(frozen=True, slots=True, eq=False)
class MelChunk:
    """One run of the encoder over ``mel`` (F, bins).

    The first ``num_frames`` frames are audio, the rest is padding. The encoder makes (F + 1) // 2
    rows of it. Rows of padding attend to those of audio, but not the reverse.
    """

    mel: torch.Tensor
    num_frames: int

    @property
    def num_rows(self) -> int:
        """Number of output rows."""
        return (len(self.mel) + 1) // 2

    @property
    def num_seen(self) -> int:
        """Number of rows that others attend to."""
        return (self.num_frames + 1) // 2


@dataclass(frozen=True, slots=True)
class _Plan:
    """Attention plan of a batch: chunks without padding come first.

    ``starts``: first row of each of those, and the end of the last. ``padded``: (start, end, end of
    the rows that are attended to).
    """

    starts: tuple[int, ...]
    padded: tuple[tuple[int, int, int], ...]


class WhisperAttention:
    """Self-attention within chunks; queries and values have a bias, keys have none."""

    __slots__ = ("head_dim", "num_heads", "o", "qkv", "scale")

    def __init__(self, config: WhisperConfig) -> None:
        size = config.hidden_size
        self.num_heads, self.head_dim = config.num_heads, size // config.num_heads
        self.qkv = Linear(size, 3 * size, bias=True)
        self.o = Linear(size, size, bias=True)
        self.scale = self.head_dim**-0.5

    def slots(self, name: str) -> Iterator[WeightSlot]:
        """Weights under ``name``."""
        size = self.o.num_outputs
        weights = [Part(f"{name}.{p}_proj.weight", (size, size)) for p in "qkv"]
        biases = [Part(f"{name}.{p}_proj.bias", (size,)) for p in "qv"]
        packed = Packed(weights[0].name, tuple(biases), self._load_packed)
        yield WeightSlot((*weights, *biases), self._load, layers=(self.qkv,), packed=packed)
        yield linear_slot(self.o, [(f"{name}.out_proj", size)])

    def _load(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bias: torch.Tensor) -> None:
        self.qkv.load(torch.cat((q, k, v)), self._bias(*bias))

    def _load_packed(self, weight: PackedWeight, *bias: torch.Tensor) -> None:
        self.qkv.load_packed(weight, self._bias(*bias))

    def _bias(self, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat((q, torch.zeros_like(q), v))

    def __call__(self, x: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """Run (T, size) -> (T, size)."""
        num_rows = x.shape[0]
        q, k, v = self.qkv(x).view(num_rows, 3, self.num_heads, self.head_dim).unbind(1)
        plain, mixed = plan.starts[-1], []
        if plain:
            heads = (q[:plain], k[:plain], v[:plain])
            mixed.append(ops.varlen_attention(*heads, plan.starts, self.scale))
        for start, end, seen in plan.padded:
            own = (q[start:end], k[start:seen], v[start:seen])
            queries, keys, values = (part.transpose(0, 1)[None] for part in own)
            found = F.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
            mixed.append(found[0].transpose(0, 1))
        joined = torch.cat(mixed) if plan.padded else mixed[0]
        return self.o(joined.reshape(num_rows, -1))


class WhisperLayer:
    """Pre-norm block: attention, then an MLP."""

    __slots__ = ("attention", "attention_norm", "mlp", "mlp_norm")

    def __init__(self, config: WhisperConfig) -> None:
        self.attention_norm = LayerNorm(config.hidden_size, NORM_EPS)
        self.attention = WhisperAttention(config)
        self.mlp_norm = LayerNorm(config.hidden_size, NORM_EPS)
        self.mlp = PlainMLP(config.hidden_size, config.inner_size, act=config.activation)

    def slots(self, name: str) -> Iterator[WeightSlot]:
        """Weights under ``name``."""
        yield norm_slot(self.attention_norm, f"{name}.self_attn_layer_norm")
        yield from self.attention.slots(f"{name}.self_attn")
        yield norm_slot(self.mlp_norm, f"{name}.final_layer_norm")
        yield linear_slot(self.mlp.fc1, [(f"{name}.fc1", self.mlp.fc1.num_outputs)])
        yield linear_slot(self.mlp.fc2, [(f"{name}.fc2", self.mlp.fc2.num_outputs)])

    def __call__(self, x: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """Run (T, size) -> (T, size) in new memory."""
        x = x + self.attention(self.attention_norm(x), plan)
        x.add_(self.mlp(self.mlp_norm(x)))
        # Large checkpoints overflow half precision; the reference clamps at the same place.
        return x.clamp_(-_HALF_LIMIT, _HALF_LIMIT) if x.dtype == torch.float16 else x


class WhisperEncoder:
    """Two convolutions, learnt positions, layers, a final norm."""

    def __init__(self, config: WhisperConfig, options: BuildOptions) -> None:
        self.config = config
        self.dtype, self.device = options.dtype, options.device
        size = config.hidden_size
        self.conv1 = Linear(KERNEL * config.num_bins, size, bias=True, act="gelu")
        self.conv2 = Linear(KERNEL * size, size, bias=True, act="gelu")
        self.positions = torch.empty(0)
        self.layers = [WhisperLayer(config) for _ in range(config.num_layers)]
        self.norm = LayerNorm(size, NORM_EPS)

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Weights under ``prefix``."""
        config, size = self.config, self.config.hidden_size
        yield _conv_slot(self.conv1, f"{prefix}conv1", config.num_bins)
        yield _conv_slot(self.conv2, f"{prefix}conv2", size)
        table = Part(f"{prefix}embed_positions.weight", (config.num_positions, size))
        yield WeightSlot((table,), self._load_positions)
        for index, layer in enumerate(self.layers):
            yield from layer.slots(f"{prefix}layers.{index}")
        yield norm_slot(self.norm, f"{prefix}layer_norm")

    def _load_positions(self, table: torch.Tensor) -> None:
        self.positions = owned(table)

    def __call__(self, chunks: Sequence[MelChunk]) -> list[torch.Tensor]:
        """Return hidden states (num_rows, size) of each chunk.

        Each has at most ``config.max_frames`` frames.
        """
        order = sorted(
            range(len(chunks)),
            key=lambda i: chunks[i].num_seen < chunks[i].num_rows,
        )
        lengths = [chunks[i].num_rows for i in order]
        x = torch.cat([self._rows(chunks[i].mel) for i in order])
        plan = _plan([chunks[i] for i in order])
        for layer in self.layers:
            x = layer(x, plan)
        parts = dict(zip(order, self.norm(x).split(lengths), strict=True))
        return [parts[i] for i in range(len(chunks))]

    def _rows(self, mel: torch.Tensor) -> torch.Tensor:
        """Run both convolutions: (F, bins) -> ((F + 1) // 2, size).

        They are products with the windows of their input.
        """
        x = mel.to(device=self.device, dtype=self.dtype)
        x = self.conv1(_windows(x, 1))
        x = self.conv2(_windows(x, 2))
        return x.add_(self.positions[: len(x)])


def _windows(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Join each row with its neighbours: (F, C) -> (ceil(F / stride), C * KERNEL).

    Neighbours beyond both ends are zeros.
    """
    return F.pad(x, (0, 0, 1, 1)).unfold(0, KERNEL, stride).flatten(1)


def _plan(chunks: Sequence[MelChunk]) -> _Plan:
    starts, padded = [0], []
    ends = accumulate(chunk.num_rows for chunk in chunks)
    for chunk, end in zip(chunks, ends, strict=True):
        if chunk.num_seen >= chunk.num_rows:
            starts.append(end)
        else:
            start = end - chunk.num_rows
            padded.append((start, end, start + chunk.num_seen))
    return _Plan(tuple(starts), tuple(padded))


def _conv_slot(layer: Linear, name: str, num_channels: int) -> WeightSlot:
    """Slot of a convolution's kernel (outputs, channels, KERNEL) and bias."""
    parts = (
        Part(f"{name}.weight", (layer.num_outputs, num_channels, KERNEL)),
        Part(f"{name}.bias", (layer.num_outputs,)),
    )
    return WeightSlot(parts, lambda kernel, bias: layer.load(owned(kernel).flatten(1), owned(bias)))
