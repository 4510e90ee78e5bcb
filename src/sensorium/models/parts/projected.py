"""A decoder with a vision tower and a two-layer projector, as the LLaVA families share it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from sensorium.errors import ConfigError
from sensorium.layers.mlp import PlainMLP
from sensorium.models.configs import ClipConfig, TextConfig
from sensorium.models.interface import BuildOptions, WeightSlot
from sensorium.models.loading.weights import linear_slot
from sensorium.models.media.pixels import Normalization
from sensorium.models.parts.decoder import DecoderModel

TOWER = "vision_tower."
PROJECTOR = "multi_modal_projector."


class ProjectedConfig(Protocol):
    """Fields of a configuration that define tower and projector."""

    @property
    def text(self) -> TextConfig:
        """The decoder."""
        ...

    @property
    def vision(self) -> ClipConfig:
        """The tower."""
        ...

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Numbers of layers of the tower after which features are taken.

        Several are concatenated along the channels.
        """
        ...

    @property
    def projector_activation(self) -> str:
        """Activation between the projector's layers."""
        ...

    @property
    def projector_bias(self) -> bool:
        """If true, the projector's layers have biases."""
        ...


Config = TypeVar("Config", bound=ProjectedConfig)
Tower = TypeVar("Tower")


class ProjectedModel(DecoderModel, Generic[Config, Tower]):
    """The decoder with a vision tower and a projector, both left out when they are not needed.

    That is when all modalities of ``seen`` are skipped.
    """

    prefix = "language_model."
    tower_class: ClassVar[type[Any]]
    seen: ClassVar[frozenset[str]]
    """Modalities that go through the tower."""

    def __init__(self, config: Config, normalization: Normalization, options: BuildOptions) -> None:
        super().__init__(config.text, options)
        self.config = config
        self.tower: Tower | None = None
        self.projector: PlainMLP | None = None
        if self.seen <= options.skip_modalities:
            self.ignored_weights += (rf"({TOWER}|{PROJECTOR}).*",)
            return
        depth, size = max(config.feature_layers), config.text.hidden_size
        width = config.vision.hidden_size * len(config.feature_layers)
        try:
            tower = self.tower_class(config.vision, depth, normalization, options)
            self.projector = PlainMLP(
                width, size, size, act=config.projector_activation, bias=config.projector_bias
            )
        except ValueError as error:
            raise ConfigError(f"config.json: {error}.", param="model") from error
        self.tower = tower
        self.ignored_weights += tower.ignored(TOWER)

    @property
    def has_encoder(self) -> bool:
        """Return whether the model takes any modality of the tower."""
        return self.tower is not None

    def slots(self) -> Iterator[WeightSlot]:
        """See ``LoadableModel``."""
        yield from super().slots()
        tower: Any = self.tower
        if tower is None or self.projector is None:
            return
        yield from tower.slots(TOWER)
        size = self.config.text.hidden_size
        yield linear_slot(self.projector.fc1, [(f"{PROJECTOR}linear_1", size)])
        yield linear_slot(self.projector.fc2, [(f"{PROJECTOR}linear_2", size)])
