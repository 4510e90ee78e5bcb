"""Mean squares of the inputs of a decoder's linear layers, by which int4 weighs its errors.

The inputs of a layer differ in size by orders of magnitude, and an error of a weight counts as much
as its input is large. So the squared error that is made small is that of the products: the sum over
inputs k of E[x_k^2] (w_k - q_k s)^2, as in AWQ (Lin et al., 2023) and in the importance matrices of
llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch, KVCacheLayout
from sensorium.layers.linear import Linear
from sensorium.models.interface import LoadableModel

NUM_TOKENS = 256
BLOCK_SIZE = 16


def mean_squares(model: LoadableModel) -> dict[str, torch.Tensor]:
    """Run tokens through a loaded decoder; return mean squares of each linear layer's inputs.

    By the name of the first part of the layer's slot: (K,) float32. Layers whose inputs are not
    finite are left out. The tokens are drawn from the vocabulary: which inputs are large depends
    little on the text.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(NUM_TOKENS, model.shape.max_position)
    ids = torch.randint(model.shape.vocab_size, (length,), generator=generator).to(model.device)
    sums: dict[str, torch.Tensor] = {}
    for slot in model.slots():
        for layer in slot.layers if slot.role == "decoder" else ():
            if isinstance(layer, Linear):
                layer.forward = _recorded(layer.forward, sums, slot.parts[0].name)
    with torch.inference_mode():
        positions = torch.arange(length, device=model.device).expand(3, -1)
        model.forward(model.embed(ids), _batch(model, length, model.rotary(positions)))
    means = {name: total / length for name, total in sums.items()}
    return {name: mean for name, mean in means.items() if mean.isfinite().all() and mean.any()}


def _recorded(
    forward: Callable[[torch.Tensor], torch.Tensor], sums: dict[str, torch.Tensor], name: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``forward`` that adds the squares of its inputs up; rows may come in parts."""

    def run(x: torch.Tensor) -> torch.Tensor:
        squares = x.flatten(0, -2).float().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares
        return forward(x)

    return run


def _batch(
    model: LoadableModel, num_tokens: int, rotary: tuple[torch.Tensor, torch.Tensor]
) -> AttentionBatch:
    """Return the step that computes one new sequence of so many tokens."""
    shape, num_blocks = model.shape, -(-num_tokens // BLOCK_SIZE)
    layout = KVCacheLayout(
        shape.num_layers, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE, model.dtype
    )

    def tensor(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=model.device)

    return AttentionBatch(
        query_start=tensor(0, num_tokens),
        kv_len=tensor(num_tokens),
        block_table=tensor(*range(num_blocks))[None],
        num_decodes=0,
        max_query_len=num_tokens,
        max_kv_len=num_tokens,
        cos=rotary[0],
        sin=rotary[1],
        caches=ops.allocate_cache(layout, num_blocks, model.device),
        query_lens=[num_tokens],
        kv_lens=[num_tokens],
    )
