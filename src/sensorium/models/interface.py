"""Interfaces of models and of model families."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:  # the HTTP process and media workers use families without ever importing torch
    import torch

    from sensorium.distributed.collectives import Collectives
    from sensorium.distributed.shard import Cut
    from sensorium.kernels.batch import AttentionBatch
    from sensorium.layers.embedding import Embedding
    from sensorium.layers.linear import Linear
    from sensorium.multimodal.items import Features, Modality
    from sensorium.multimodal.processor import Processor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of a decoder that the engine needs for memory planning, cache layout and checks."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    num_deep: int = 0
    """Number of parts of hidden_size that an item's embedding has besides the first, for deeper
    layers (DeepStack)."""
    window: int | None = None
    """Tokens that a row attends to at most, its own among them, in every layer; None for all."""
    short_context: int | None = None
    """Tokens up to which a sequence has other rotary factors than beyond, where these differ
    (longrope, dynamic)."""
    rope_grows: bool = False
    """If true, the rotary factors beyond ``short_context`` depend on the length of the sequence
    (dynamic)."""

    @property
    def embed_size(self) -> int:
        """Size of one embedding of an item."""
        return (1 + self.num_deep) * self.hidden_size


class Decoded(NamedTuple):
    """Results of a step of T generated tokens."""

    hidden: torch.Tensor
    """(T, H)"""
    logits: torch.Tensor
    """(T, V)"""
    tokens: torch.Tensor
    """(T,) int64: the likeliest token of each row, the first of equals; -1 minus it for a row whose
    numbers are doubtful and have to be looked at."""


class Model(Protocol):
    """A loaded model. Not thread-safe; called under ``torch.inference_mode()`` by one thread.

    Shapes: T tokens of the step, H hidden size, V vocabulary.
    """

    shape: TextShape
    dtype: torch.dtype
    device: torch.device

    @property
    def has_encoder(self) -> bool:
        """Return whether ``encode`` takes items of any modality."""
        ...

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        """Return embeddings (num_embeds, shape.embed_size) of each item.

        The items (of one modality) may have different sizes and are run in one batch.
        """
        ...

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return token embeddings (T, shape.embed_size) of ids (T,).

        Ids of placeholder positions may be anything below V.
        """
        ...

    def rotary(
        self, positions: torch.Tensor, lengths: Sequence[tuple[int, int]] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos, sin (T, rotary_dim // 2) float32 of positions.

        positions: (T,) or, with several axes, (3, T) int64. lengths:
        (``EngineRequest.rope_length``, number of rows) of consecutive sequences; none when all are
        0.
        """
        ...

    def forward(self, embeds: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Return hidden states (T, H) after the final norm.

        Writes K and V of all T tokens into ``batch.caches``. May overwrite ``embeds``.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (N, V) of hidden states (N, H), in the type in which they are computed."""
        ...

    def decode(self, ids: torch.Tensor, batch: AttentionBatch) -> Decoded | None:
        """Run a step of generated tokens ids (T,), each of a sequence of its own, at once.

        The numbers are those of ``embed``, ``forward`` and ``logits``. The result is valid until
        the next step. None, with nothing computed: use those.
        """
        ...


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """``config.json`` and its neighbours of a checkpoint folder, parsed but not interpreted."""

    folder: str
    config: dict[str, Any]
    generation: dict[str, Any]
    preprocessor: dict[str, Any]
    processor: dict[str, Any]
    video_preprocessor: dict[str, Any] = field(default_factory=dict)
    """Preprocessor of videos; the image processor's values where the checkpoint has none of its
    own."""
    parts: Mapping[str, LoadedConfig] = field(default_factory=dict)
    """Checkpoints that complete this one, by the field of config.json that names them: see
    ``PartCheckpoint``."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of building a model.

    ``skip_modalities``: their encoders are neither built nor loaded. ``head``: if false, no logits
    will be requested and the language-model head is not loaded. ``random_weights``: every slot will
    be filled with random numbers, whatever the checkpoint's folder holds. ``replay``: small decode
    steps may be captured and replayed. ``collectives``: the decoder, its embedding and its head are
    split over these ranks, of which this process is one; None for a model on its own.
    ``encoders_only``: decoder, embedding and head are not loaded, and cannot be used.
    """

    dtype: torch.dtype
    device: torch.device
    skip_modalities: frozenset[str] = frozenset()
    head: bool = True
    random_weights: bool = False
    replay: bool = True
    collectives: Collectives | None = None
    encoders_only: bool = False


class Part(NamedTuple):
    """One tensor of a checkpoint: its name (in our spelling) and its shape.

    ``cut``: what the slot takes of it; None for the whole.
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut | None = None

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of what the slot takes."""
        return self.shape if self.cut is None else self.cut.shape_of(self.shape)


Role = Literal["decoder", "encoder", "head"]
"""Owners of weights: decoder layers; towers and projectors; head and token embedding."""


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """A place in a model that takes weights: its tensors and the function that sets them.

    ``assign`` is called once, with the tensors of ``parts`` in order, in the model's dtype and on
    its device. ``tied``: set where the one part is expected to be the same as another. ``layers``:
    those that ``assign`` loads and whose weights may be quantized. ``role``: what they belong to.
    ``packed``: how the slot takes the packed weight of its one layer instead. ``is_swapped``:
    this layer has the second half of the rows of its one part in front.
    """

    parts: tuple[Part, ...]
    assign: Callable[..., None]
    tied: Tied | None = None
    layers: tuple[Linear | Embedding, ...] = ()
    role: Role = "encoder"
    packed: Packed | None = None
    is_swapped: bool = False


@dataclass(frozen=True, slots=True)
class Packed:
    """Filling of a slot with the weight of its layer as an earlier start has packed it.

    ``name``: of the weight in its model. ``parts``: what is read of the checkpoint all the same,
    such as a bias. ``assign``: takes the weight, then the tensors of ``parts`` as a slot does.
    """

    name: str
    parts: tuple[Part, ...]
    assign: Callable[..., None]


@dataclass(frozen=True, slots=True)
class Tied:
    """A part of another slot, filled before, that a slot shares.

    It is not shared when the checkpoint holds other values for the slot.
    """

    part: Part
    assign: Callable[[], None]
    """Is called, in place of the slot's own ``assign``, where both are the same."""


class LoadableModel(Model, Protocol):
    """A model whose weights the loader fills in."""

    ignored_weights: tuple[str, ...]
    """Regular expressions of weight names that this model does not use, such as those of layers
    that it skips."""

    def slots(self) -> Iterator[WeightSlot]:
        """Return each place that takes weights, with the names and shapes of the checkpoint."""
        ...


@dataclass(frozen=True, slots=True)
class PartCheckpoint:
    """Another checkpoint that completes one, such as a decoder that is published separately.

    ``field``: of config.json, with its Hugging Face id or folder (also relative to the checkpoint's
    own); nothing is completed where it is absent or null. ``renames``: as ``Family.renames``, for
    its weights; where both hold a weight, that of the checkpoint itself is used. ``modality``: the
    part is its encoder, and not needed where the modality is skipped.
    """

    field: str
    renames: tuple[tuple[str, str], ...]
    modality: Modality | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the registry: the configuration, processor and model of some architectures.

    Nothing here imports torch until ``build_model`` is called.
    """

    name: str
    """Name in the docs, such as ``LLaVA-1.5``."""
    checkpoint: str
    """The published checkpoint that the docs name."""
    architectures: tuple[str, ...]
    """Values of ``architectures`` in config.json."""
    modalities: tuple[Modality, ...]
    """Modalities that it takes besides text."""
    shape: Callable[[LoadedConfig], TextShape]
    """Sizes of the decoder. Raises ConfigError for values that are missing or impossible."""
    build_processor: Callable[[LoadedConfig], Processor | None]
    """The processor of its media; None for a text model."""
    build_model: Callable[[LoadedConfig, BuildOptions], LoadableModel]
    """The model, without weights."""
    renames: tuple[tuple[str, str], ...]
    """(regular expression, replacement): the first that matches turns a checkpoint's weight name
    into ours."""
    stop_tokens: tuple[str, ...] = ()
    """Texts of tokens that end an answer besides those of the checkpoint's configuration, where
    the tokenizer has them."""
    template: tuple[str, str] | None = None
    """(package, file) of the fallback chat template."""
    transcription: Callable[[str | None], str] | None = None
    """Prompt that transcribes the audio in it, of a language (``en``) or an unknown one, for models
    that are trained with one of their own."""
    parts: tuple[PartCheckpoint, ...] = ()
    """Other checkpoints that may complete one of this family."""
    bidirectional: Literal["items", "prompt"] | None = None
    """Tokens with bidirectional attention: each run of an item's embeddings, or prompts with
    items."""
    embedders: tuple[str, ...] = ()
    """Further values of ``architectures``, of checkpoints without a language-model head: they
    return embeddings."""
    model_types: tuple[str, ...] = ()
    """Values of ``model_type`` in config.json, for checkpoints that name no architecture."""
    invariant: bool = True
    """If true, all results can have the same bits whatever else is in the step."""
    quantizable: bool = True
    """If true, its linear layers are ours, whose weights can be quantized, and rest in 16
    bits on any CPU."""
    separable: bool = True
    """If true, its encoders can be loaded, and run, without its decoder."""
    same_on_threads: bool = True
    """If true, the number of threads changes no bit where products are ours. Torch's own functions
    cut a tensor into as many parts as there are threads, which decides their last bits."""

    def chat_template(self) -> str | None:
        """Return the fallback chat template, for checkpoints of this family that publish none."""
        if self.template is None:
            return None
        package, file = self.template
        return resources.files(package).joinpath(file).read_text(encoding="utf-8")


def stop_token_ids(loaded: LoadedConfig) -> tuple[int, ...]:
    """Return the ids that end an answer: ``eos_token_id`` of generation_config.json or config.json.

    They are in order, each once. Values that are not ids (integers from 0) are ignored.
    """
    text = loaded.config.get("text_config")
    for source in (loaded.generation, loaded.config, text if isinstance(text, dict) else {}):
        value = source.get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        ids = [i for i in values if type(i) is int and i >= 0]
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()


def warn_of_defaults(loaded: LoadedConfig, family: Family) -> None:
    """Log a warning where no file of a checkpoint configures its image preprocessing.

    The processor then uses the defaults of its family. A model that was trained with other values
    answers worse with these.
    """
    if "image" in family.modalities and not loaded.preprocessor:
        logger.warning(
            "The model has neither preprocessor_config.json nor an image_processor in "
            "processor_config.json: images are prepared with the defaults of %s. Copy the file "
            "from the checkpoint that the model was made from.",
            family.name,
        )
