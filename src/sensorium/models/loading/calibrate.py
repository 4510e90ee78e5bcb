"""Mean squares of the inputs of a decoder's linear layers and head, by which int4 weighs errors.

The inputs of a layer differ in size by orders of magnitude, and an error of a weight counts as much
as its input is large. So the squared error that is made small is that of the products: the sum over
inputs k of E[x_k^2] (w_k - q_k s)^2, as in AWQ (Lin et al., 2023) and in the importance matrices of
llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch, KVCacheLayout
from sensorium.kernels.cpu import huge_pages
from sensorium.layers.embedding import Embedding
from sensorium.layers.linear import Linear
from sensorium.models.interface import LoadableModel, WeightSlot
from sensorium.models.loading.coded import dense
from sensorium.models.loading.fill import assign
from sensorium.models.loading.memory import MappedFiles, Scratch
from sensorium.models.loading.weights import WeightSource

NUM_TOKENS = 256
BLOCK_SIZE = 16


def mean_squares(
    model: LoadableModel, source: WeightSource, proceed: Callable[[], object] = lambda: None
) -> dict[str, torch.Tensor]:
    """Run tokens through a decoder without weights; return mean squares of linear layers' inputs.

    By the name of the first part of the layer's slot: (K,) float32; the head by those of all parts
    that it may be loaded from. Layers whose inputs are not finite are left out. The tokens are
    drawn from the vocabulary: which inputs are large depends little on the text. A layer's weight
    is loaded when it is needed and dropped then, so that it takes little memory; the model is of no
    use afterwards. proceed: called before each layer; what it raises ends this.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(NUM_TOKENS, model.shape.max_position, model.shape.vocab_size)
    ids = torch.randint(model.shape.vocab_size, (length,), generator=generator)
    sums: dict[str, torch.Tensor] = {}
    with torch.inference_mode(), huge_pages.short_lived():
        _prepare(model, source, ids, sums, proceed)
        positions = torch.arange(length, device=model.device).expand(3, -1)
        embeds = model.embed(torch.arange(length, device=model.device))
        hidden = model.forward(embeds, _batch(model, length, model.rotary(positions)))
    sums |= dict.fromkeys(_head_parts(model), hidden.float().square().sum(0))
    means = {name: total / length for name, total in sums.items()}
    return {name: mean for name, mean in means.items() if mean.isfinite().all() and mean.any()}


def _prepare(
    model: LoadableModel,
    source: WeightSource,
    ids: torch.Tensor,
    sums: dict[str, torch.Tensor],
    proceed: Callable[[], object],
) -> None:
    """Load norms, of the embedding the rows of the ids alone, and let linear layers load later."""
    scratch, mapped, slots = Scratch(), source.mapped(), list(model.slots())
    stored = {slot.tied.part: slot.parts[0] for slot in slots if slot.tied is not None}
    for slot in slots:
        if slot.role == "head":
            for layer in slot.layers:
                if isinstance(layer, Embedding):
                    [part] = slot.parts
                    table = source.read(part if source.has(part) else stored.get(part, part))
                    rows = dense(table, model.dtype)[ids]
                    layer.weight = rows.to(device=model.device, dtype=model.dtype)
        elif slot.layers:
            run = _Passing(model, slot, source, mapped, scratch, sums, proceed)
            for layer in slot.layers:
                if isinstance(layer, Linear):
                    layer.forward = run
        else:
            assign(slot, [source.read(part) for part in slot.parts], model, scratch, mapped)


def _head_parts(model: LoadableModel) -> Iterator[str]:
    """Yield the names of the parts from which the language-model head may be loaded."""
    for slot in model.slots():
        if slot.role == "head" and any(isinstance(layer, Linear) for layer in slot.layers):
            yield slot.parts[0].name
            if slot.tied is not None:
                yield slot.tied.part.name


class _Passing:
    """Product of a layer that loads its weight for each call, and adds its inputs' squares up."""

    def __init__(
        self,
        model: LoadableModel,
        slot: WeightSlot,
        source: WeightSource,
        mapped: MappedFiles | None,
        scratch: Scratch,
        sums: dict[str, torch.Tensor],
        proceed: Callable[[], object],
    ) -> None:
        self._model, self._slot, self._source = model, slot, source
        self._mapped, self._scratch = mapped, scratch
        self._sums, self._proceed = sums, proceed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._proceed()
        name = self._slot.parts[0].name
        squares = x.flatten(0, -2).float().square().sum(0)
        self._sums[name] = self._sums[name] + squares if name in self._sums else squares
        tensors = [self._source.read(part) for part in self._slot.parts]
        assign(self._slot, tensors, self._model, self._scratch, self._mapped)
        [layer] = self._slot.layers
        assert isinstance(layer, Linear)
        result = layer.forward(x)
        layer.weight, layer.forward = None, self
        return result


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
