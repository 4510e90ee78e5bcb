"""Options of loading and processing an item: the configuration's, its request's, its part's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sensorium.config import MediaConfig
from sensorium.errors import ConfigError, InvalidRequestError, RequestError
from sensorium.multimodal.decode.image import ImageOptions
from sensorium.multimodal.decode.loaders import LOADERS, check_loading_options
from sensorium.multimodal.items import MediaRef, Modality
from sensorium.multimodal.parse import part_options
from sensorium.multimodal.processor import Processor


@dataclass(frozen=True, slots=True)
class ItemOptions:
    """Options of one item.

    Attributes:
        processing: ``mm_processor_kwargs``.
        loading: ``media_io_kwargs`` by modality, as its loader has parsed them.
    """

    processing: Mapping[str, Any]
    loading: Mapping[Modality, Any]


class OptionRules:
    """Merges and checks options; made once for a model.

    Raises ConfigError for invalid options of the configuration.
    """

    def __init__(
        self, config: MediaConfig, processor: Processor, modalities: Sequence[Modality]
    ) -> None:
        self._config = config
        self._processor = processor
        self._modalities = modalities
        try:
            self.configured = self.of_request(None, None)
        except RequestError as error:
            raise ConfigError(error.message, param=error.param) from None

    def of_request(
        self,
        mm_processor_kwargs: Mapping[str, Any] | None,
        media_io_kwargs: Mapping[str, Any] | None,
    ) -> ItemOptions:
        """Merge the options of a request over the configuration's. Raises InvalidRequestError."""
        for name, given in (
            ("mm_processor_kwargs", mm_processor_kwargs),
            ("media_io_kwargs", media_io_kwargs),
        ):
            if given is not None and not isinstance(given, Mapping):
                raise InvalidRequestError(
                    f"{name} must be a mapping, got {type(given).__name__}.", param=name
                )
        processing = {**self._config.mm_processor_kwargs, **(mm_processor_kwargs or {})}
        self._processor.check_options(processing)
        return ItemOptions(processing, self._loading(media_io_kwargs or {}))

    def of_item(self, ref: MediaRef, options: ItemOptions) -> ItemOptions:
        """Merge an item's own options over ``options``. Raises InvalidRequestError at its place."""
        if not ref.processing and not ref.loading:
            return options
        processing, loading = options.processing, options.loading
        try:
            if ref.processing:
                processing = {**processing, **ref.processing}
                self._processor.check_options(processing)
            if ref.loading:
                own = LOADERS[ref.modality].options.parse(
                    ref.loading, f"media_io_kwargs.{ref.modality}"
                )
                if isinstance(own, ImageOptions) and ref.modality in loading:
                    own = loading["image"].bounded_by(own.max_pixels)
                loading = {**loading, ref.modality: own}
        except InvalidRequestError as error:
            message = part_options.as_written(ref.modality, error.message)
            raise InvalidRequestError(message, param=ref.param) from None
        return ItemOptions(processing, loading)

    def _loading(self, request: Mapping[str, Any]) -> dict[Modality, Any]:
        for given in (self._config.media_io_kwargs, request):
            check_loading_options(given, self._modalities)
        return {
            modality: LOADERS[modality].options.parse(
                {**self._config.media_io_kwargs.get(modality, {}), **request.get(modality, {})},
                f"media_io_kwargs.{modality}",
            )
            for modality in self._modalities
        }
