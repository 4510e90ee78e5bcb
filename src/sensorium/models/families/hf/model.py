"""A model of transformers behind the ``Model`` protocol."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sensorium.errors import ConfigError
from sensorium.kernels.batch import AttentionBatch
from sensorium.kernels.cpu.linear.onednn import FREE_ROWS
from sensorium.models.families.hf import attention, check, encoding, processing
from sensorium.models.families.hf.adapter import error_text
from sensorium.models.families.hf.config import read_hf_config, refuse, text_shape
from sensorium.models.families.hf.processing import HfProcessor
from sensorium.models.gguf.folder import encoder_of, file_of
from sensorium.models.interface import BuildOptions, LoadedConfig, Part, WeightSlot
from sensorium.models.loading.memory import owned
from sensorium.models.loading.published.gguf import GgufWeights
from sensorium.models.loading.weight_files import weight_files
from sensorium.models.loading.weights import not_ignored, read_safetensors
from sensorium.multimodal.items import Features, MediaItem, Modality
from sensorium.multimodal.processor import PlacedItem

logger = logging.getLogger(__name__)

EVERYTHING = r".*"
ROW_MULTIPLE = 4
"""Row multiple to which small steps are padded, as measured for float32 products of torch."""
MAX_TRIED = 1024
"""Longest prompt with an item that is compared at the start: the model's own attention takes the
square of it."""


class _DecoderOutput:
    """Result of a decoder that has hidden states only."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _FixedDecoder(torch.nn.Module):
    """Stand-in for a head's decoder that returns hidden states that are already computed."""

    @property
    def decoder(self) -> _FixedDecoder:
        """This object: some heads use the decoder inside the model that they are given."""
        return self

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _DecoderOutput:
        """Return the given hidden states, (1, N, H)."""
        return _DecoderOutput(inputs_embeds)


class HfModel:
    """A model of transformers behind the ``Model`` protocol.

    The decoder runs the T tokens of a step as one row, (1, T, H). ``rotary`` passes positions on:
    as ``batch.cos`` the position ids (1, T), or (3, 1, T) where they have axes; as ``batch.sin``
    the bidirectional spans (2, T) of ``AttentionVariant``, or nothing (0, T), as no layer of ours
    rotates here.
    """

    ignored_weights: tuple[str, ...] = (EVERYTHING,)

    def __init__(
        self,
        inner: Any,
        config: Any,
        loaded: LoadedConfig,
        options: BuildOptions,
        processor: HfProcessor | None,
    ) -> None:
        self.inner = inner
        self.shape = text_shape(loaded)
        self.dtype, self.device = options.dtype, options.device
        self._random = options.random_weights
        self.decoder = inner.get_decoder()
        self.table = inner.get_input_embeddings()
        self.first_position = 0
        self._has_axes = processor is not None and processor.axes_of is not None
        self.head = _head(inner, config)
        places = processor.places if processor is not None else ()
        self._fills = {
            place.modality: place.fill
            for place in places
            if place.modality not in options.skip_modalities
        }

    def drop_encoders(self) -> None:
        """Free everything but decoder and head, where no modality is left that needs it."""
        kept = (self.decoder, self.table, *filter(None, self.head.children()))
        needed = {module for root in kept for module in root.modules()}
        for owner in [m for m in self.inner.modules() if m not in needed]:
            for name, child in owner._modules.items():
                if needed.isdisjoint(child.modules() if child is not None else ()):
                    owner._modules[name] = None

    def adopt(self) -> None:
        """Measure the decoder, set our attention, and check that the results stay the same.

        Raises UnfitError with the reason when they do not.
        """
        use(self.decoder, attention.register())
        vocab_size = self.shape.vocab_size
        ids = [torch.arange(1, 1 + length) * 7919 % vocab_size for length in check.LENGTHS]
        embeds = [self.embed(row.to(self.device)) for row in ids]
        geometry = check.measure(self.decoder, embeds[0], self.shape.num_layers)
        self.shape = replace(
            self.shape, num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim
        )
        use(self.decoder, "eager")
        wholes = [
            check.run_whole(
                self.inner,
                self.decoder,
                inputs_embeds=rows[None],
                attention_mask=torch.ones((1, len(rows)), dtype=torch.int64, device=self.device),
            )
            for rows in embeds
        ]
        self.first_position = check.first_position(wholes[0])
        use(self.decoder, attention.NAME)
        check.check_pieces(self, wholes, embeds)

    def try_media(self, processor: HfProcessor, modality: Modality) -> None:
        """Encode a small item, and check that the decoder treats it as the whole model does.

        Raises UnfitError with the reason when it does not.
        """
        features = processor.process(modality, processing.probe_item(processor, modality), {})
        ids = features.arrays["input_ids"][0].tolist()
        (embeds,) = encoding.embed_items(self.inner, self.decoder, [features.arrays], self.dtype)
        if embeds.shape != (len(ids), self.shape.hidden_size):
            raise attention.UnfitError(
                f"it makes embeddings {tuple(embeds.shape)} of {len(ids)} tokens of one {modality}"
            )
        if len(ids) > MAX_TRIED:
            return
        use(self.decoder, "eager")
        inputs = encoding.inputs_of([features.arrays], self.device, self.dtype)
        whole = check.run_whole(self.inner, self.decoder, **inputs)
        use(self.decoder, attention.NAME)
        item = MediaItem(modality, b"", features)
        placed = PlacedItem(item, processing.runs_of(ids, self._fills[modality]))
        found = processor.positions(ids, [placed])
        rows = np.arange(len(ids)) if found is None else found[0]
        check.check_media(self, whole, embeds, torch.from_numpy(rows).long())

    @property
    def encodes(self) -> tuple[Modality, ...]:
        """Return the modalities that ``encode`` takes."""
        return tuple(self._fills)

    @property
    def has_encoder(self) -> bool:
        """Return whether the model takes media."""
        return bool(self._fills)

    def slots(self) -> Iterator[WeightSlot]:
        """Slots of random weights, one per parameter; none when the weights are loaded already."""
        if not self._random:
            return
        for name, parameter in self.inner.named_parameters():
            yield WeightSlot((Part(name, tuple(parameter.shape)),), parameter.data.copy_)

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        """Return embeddings (num_embeds, H) of each item, as the model itself merges them.

        Items whose arrays have the same shapes are run as one batch.
        """
        groups: dict[Any, list[int]] = {}
        for index, item in enumerate(items):
            if item.modality not in self._fills:
                raise ValueError(f"this model has no encoder for {item.modality}")
            shapes = tuple((name, array.shape) for name, array in sorted(item.arrays.items()))
            groups.setdefault(shapes, []).append(index)
        found: dict[int, torch.Tensor] = {}
        for group in groups.values():
            embeds = encoding.embed_items(
                self.inner, self.decoder, [items[index].arrays for index in group], self.dtype
            )
            for index, rows in zip(group, embeds, strict=True):
                ids = torch.from_numpy(items[index].arrays["input_ids"][0])
                filled = (ids == self._fills[items[index].modality]).to(rows.device)
                found[index] = rows[filled].clone()
        return [found[index] for index in range(len(items))]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return token embeddings (T, H).

        Ids past the table (placeholders of some models) get an arbitrary one.
        """
        known = ids.clamp(max=self.table.weight.shape[0] - 1)
        embeds: torch.Tensor = self.table(known[None])[0]
        return embeds.to(self.dtype)

    def rotary(
        self, positions: torch.Tensor, lengths: Sequence[tuple[int, int]] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return position ids, and bidirectional spans, of positions (T,) or (3, T).

        The three rows are axes, or a token's index and the first and last index of its span.
        """
        rows = positions if positions.dim() == 2 else positions[None]
        if self._has_axes:
            return rows.expand(3, -1)[:, None] + self.first_position, rows[:0]
        spans = rows[1:]
        if not bool((spans[-1:] > spans[:1]).any()):
            spans = spans[:0]
        return rows[:1] + self.first_position, spans

    def forward(self, embeds: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Return hidden states (T, H) after the final norm."""
        step = attention.Step(batch, batch.sin if len(batch.sin) else None)
        rows, position_ids = _pad_few_rows(embeds, 0), _pad_few_rows(batch.cos, batch.cos.dim() - 1)
        with attention.running(step):
            out = self.decoder(inputs_embeds=rows[None], position_ids=position_ids, use_cache=False)
        hidden: torch.Tensor = out.last_hidden_state[0, : len(embeds)]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (N, V), scaled and capped as by the model's own head."""
        rows = _pad_few_rows(hidden, 0)
        logits: torch.Tensor = self.head(inputs_embeds=rows[None], use_cache=False).logits[0]
        return logits[: len(hidden)]

    def decode(self, ids: torch.Tensor, batch: AttentionBatch) -> None:
        """Return None: see ``Model``."""


def _pad_few_rows(rows: torch.Tensor, axis: int) -> torch.Tensor:
    """Pad rows along ``axis`` with zeros where they are few.

    Linear layers on a CPU sum a few rows in another order.
    """
    num_rows = rows.shape[axis]
    if not rows.is_cpu or num_rows >= FREE_ROWS or num_rows % ROW_MULTIPLE == 0:
        return rows
    missing = list(rows.shape)
    missing[axis] = -num_rows % ROW_MULTIPLE
    return torch.cat((rows, rows.new_zeros(missing)), dim=axis)


def build(
    architecture: str, loaded: LoadedConfig, options: BuildOptions, processor: HfProcessor | None
) -> HfModel:
    """Load the model, and check its results over our cache against its own forward pass.

    Raises ConfigError for weights that do not fit, UnsupportedModelError with the reason for a
    model that cannot run.
    """
    import transformers

    config, kind = read_hf_config(loaded.config), getattr(transformers, architecture)
    if options.random_weights:
        inner = kind._from_config(config, dtype=options.dtype)
    else:
        inner = _load(kind, loaded, config, options)
    inner.eval().requires_grad_(False).to(options.device)
    for parameter in inner.parameters():
        parameter.data = owned(parameter.data)
    model = HfModel(inner, config, loaded, options, processor)
    try:
        with torch.inference_mode():
            model.adopt()
            if processor is not None:
                for modality in model.encodes:
                    model.try_media(processor, modality)
                if not model.encodes:
                    model.drop_encoders()
    except attention.UnfitError as error:
        refuse(config, str(error))
    except Exception as error:
        logger.debug("trying the model out failed", exc_info=True)
        refuse(config, f"trying it out failed with {error_text(error, loaded.folder)}")
    return model


def use(decoder: torch.nn.Module, implementation: str) -> None:
    """Select the attention of all layers of a decoder."""
    for module in decoder.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = implementation


def _load(kind: Any, loaded: LoadedConfig, config: Any, options: BuildOptions) -> Any:
    """Load the model with the checkpoint's weights. Raises ConfigError when they do not fit.

    The library is given the weights and no folder: in a folder it would also search for adapters,
    and add them to a model that they have been merged into. A GGUF file has no weights that it does
    not need; safetensors files may.
    """
    gguf = file_of(loaded.folder)
    advice = "config.json and the safetensors files belong together"
    if gguf is not None:
        advice = "the GGUF file is of this model"
        weights = dict(GgufWeights(gguf, (), encoder_of(loaded.folder)).tensors(options.dtype))
    else:
        weights = {
            name: tensor
            for file in weight_files(Path(loaded.folder))
            for name, tensor in read_safetensors(file).items()
        }
    inner, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=options.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told below, with those that are missing
    )
    found = {
        "are missing": info["missing_keys"],
        "have other shapes": info["mismatched_keys"],
        "have no place in this architecture": (
            [] if gguf is None else not_ignored(info["unexpected_keys"])
        ),
    }
    problems = [
        f"{len(names)} {what} ({', '.join(map(str, sorted(names, key=str)[:6]))})"
        for what, names in found.items()
        if names
    ]
    if problems:
        raise ConfigError(
            f"The weights do not fit the model's configuration: {'; '.join(problems)}. Check that "
            f"{advice}.",
            param="model",
        )
    return inner


def _head(inner: Any, config: Any) -> Any:
    """Return the part of the model that makes logits of hidden states."""
    outputs = inner.get_output_embeddings()
    owners = [] if outputs is None else [m for m in inner.modules() if outputs in m.children()]
    names = [getattr(owner, "base_model_prefix", "") for owner in owners]
    if not names or names[0] not in owners[0]._modules:
        refuse(config, "its head cannot be told from its decoder")
    head = copy.copy(owners[0])
    head._modules = {**head._modules, names[0]: _FixedDecoder()}
    return head
