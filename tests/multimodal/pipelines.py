"""A media pipeline with its parts at hand, and references to load with it."""

from __future__ import annotations

from sensorium.config import MediaConfig
from sensorium.multimodal.cache.features import FeatureCache, NamedFeatures
from sensorium.multimodal.items import MediaItem, MediaRef, Modality
from sensorium.multimodal.pipeline import MediaPipeline
from sensorium.multimodal.shared_memory import SharedArraysFolder
from sensorium.multimodal.workers.threads import ThreadWorkers
from tests.multimodal.support import (
    FakeProcessor,
)


class Setup:
    """A pipeline with its parts at hand."""

    def __init__(
        self,
        *,
        cache_bytes: int = 1 << 20,
        ids_matter: bool = True,
        elsewhere: NamedFeatures | None = None,
        shared_folder: SharedArraysFolder | None = None,
        **config,
    ) -> None:
        config.setdefault("allowed_media_domains", ("127.0.0.1",))
        self.processor = FakeProcessor()
        self.cache = FeatureCache(cache_bytes)
        self.pipeline = MediaPipeline(
            MediaConfig(**config),
            self.processor,
            self.cache,
            workers=ThreadWorkers(2),
            ids_matter=ids_matter,
            elsewhere=elsewhere,
            shared_folder=shared_folder,
        )

    async def load(self, *refs: MediaRef, **options) -> list[MediaItem]:
        items = await self.pipeline.load(refs, **options)
        self.cache.check_integrity()
        return items


def url_ref(
    url: str, uuid: str | None = None, param: str = "p", modality: Modality = "image"
) -> MediaRef:
    return MediaRef(modality, "url", url, uuid, param)


def object_ref(source: object, uuid: str | None = None, param: str = "p") -> MediaRef:
    return MediaRef("image", "object", source, uuid, param)


def cached_ref(uuid: str | None, param: str = "p") -> MediaRef:
    return MediaRef("image", "cached", None, uuid, param)


def embeds_ref(source: object, uuid: str | None = None, param: str = "p") -> MediaRef:
    return MediaRef("image", "embeds", source, uuid, param)
