"""Digests of the items of requests for one model: by a caller's id, or by content."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from sensorium.multimodal.cache import digest as digests
from sensorium.multimodal.context import LoadContext
from sensorium.multimodal.items import MediaItem, Modality, Page
from sensorium.multimodal.processor import Processor
from sensorium.multimodal.workers.threads import ThreadWorkers

MAX_INLINE_HASH_CHARS = 1 << 19
"""Length of a ``data:`` URL that the event loop hashes itself: a quarter of a millisecond."""

_logger = logging.getLogger(__name__)


class ItemDigests:
    """Digests of items. Usable from several event loops; large contents are hashed in a thread.

    ``ids_matter``: see ``MediaPipeline``.
    """

    def __init__(self, processor: Processor, workers: ThreadWorkers, *, ids_matter: bool) -> None:
        self._processor = processor
        self._workers = workers
        self.ids_matter = ids_matter
        self._warned_of_ids = False

    def of_id(self, modality: Modality, uuid: str | None, context: LoadContext) -> bytes | None:
        """Return the digest for a caller's id; None without an id, or when ids are ignored."""
        if uuid is None:
            return None
        if not self.ids_matter:
            if not self._warned_of_ids:
                self._warned_of_ids = True
                _logger.warning(
                    "multi_modal_uuids are ignored: the processor cache and prefix caching are "
                    "both off"
                )
            return None
        content = digests.uuid_digest(modality, uuid, tenant=context.tenant, salt=context.salt)
        return self.of_content(modality, content, context)

    def of_content(self, modality: Modality, content: bytes, context: LoadContext) -> bytes:
        """Return the digest of an item whose content has a digest."""
        return digests.item_digest(
            modality,
            content,
            dataclasses.asdict(context.options.loading[modality]),
            self._processor.identity(
                modality, context.options.processing, context.num_items[modality]
            ),
        )

    async def content(self, source: Any) -> bytes:
        """Return the content digest of a page of a PDF, or of an object of the caller's."""
        if isinstance(source, Page):
            return digests.page_digest(source)
        return await self._workers.run(digests.object_digest, source)

    async def text(self, url: str) -> bytes:
        """Hash a URL; a short one here, as switching to a thread would take longer."""
        if len(url) <= MAX_INLINE_HASH_CHARS:
            return digests.text_digest(url)
        return await self._workers.run(digests.text_digest, url)


def with_content(item: MediaItem) -> MediaItem:
    """Return an item that a caller named, with its content and length in its digest.

    The id may have been used for another item before, or in another process: behind the pipeline
    what was made of one must not stand for the other. Where the content was not hashed, as that of
    an object of the caller's, embeddings in a cache at least fit.
    """
    features = item.features
    digest = digests.framed("named", [item.digest, features.content, features.num_embeds])
    return dataclasses.replace(item, digest=digest)
