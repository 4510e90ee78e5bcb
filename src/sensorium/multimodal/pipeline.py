"""Loading of media: from references to items with features, concurrently and each content once."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Coroutine, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from sensorium import tracing
from sensorium.config import MediaConfig
from sensorium.errors import (
    InvalidEmbeddingsError,
    InvalidRequestError,
    MediaNotCachedError,
    MediaTooLargeError,
    OverloadedError,
    counted,
    located,
)
from sensorium.multimodal.cache import digest as digests
from sensorium.multimodal.cache.features import DigestMemo, FeatureCache, NamedFeatures
from sensorium.multimodal.cache.single_flight import SingleFlight
from sensorium.multimodal.context import LoadContext
from sensorium.multimodal.decode.loaders import LOADERS, DecodeJob, Prepared
from sensorium.multimodal.fetch.fetcher import Fetcher, is_data_url, is_local
from sensorium.multimodal.files import FileOpener
from sensorium.multimodal.item_digests import ItemDigests, with_content
from sensorium.multimodal.items import (
    Features,
    Fetched,
    LoadCost,
    MediaItem,
    MediaRef,
    Page,
)
from sensorium.multimodal.parse import limits, part_options
from sensorium.multimodal.parse.data import has_image_shape
from sensorium.multimodal.parse.embeddings import decode_embeddings
from sensorium.multimodal.parse.item_options import OptionRules
from sensorium.multimodal.processor import Processor
from sensorium.multimodal.shared_memory import NoRoomError, SharedArrays, SharedArraysFolder
from sensorium.multimodal.stats import MediaStats, StageCounters
from sensorium.multimodal.workers.decode_worker import NO_ROOM
from sensorium.multimodal.workers.pool import Decoders, ThreadDecoders
from sensorium.multimodal.workers.threads import ThreadWorkers

MAX_SEEN_URLS = 4096

T = TypeVar("T")
_logger = logging.getLogger(__name__)


class _Loaded(NamedTuple):
    features: Features
    decode_seconds: float
    preprocess_seconds: float


class MediaPipeline:
    """Loads the media of requests for one model. Usable from several event loops.

    Args:
        config: Limits and options.
        processor: The model's processor.
        cache: Features by item digest.
        workers: Threads for short work; made here by default.
        decoders: Decode encoded files; threads of this process by default.
        shared_folder: Holds all features in shared memory, for another process.
        package_files: See ``Guard``.
        ids_matter: False if neither the processor cache nor the prefix cache is on. The callers'
            ids would change nothing; they are then ignored, with one warning.
        elsewhere: Features that other processes have under callers' ids.
    """

    def __init__(
        self,
        config: MediaConfig,
        processor: Processor,
        cache: FeatureCache,
        *,
        workers: ThreadWorkers | None = None,
        decoders: Decoders | None = None,
        shared_folder: SharedArraysFolder | None = None,
        package_files: bool = False,
        ids_matter: bool = True,
        elsewhere: NamedFeatures | None = None,
    ) -> None:
        self.modalities = tuple(m for m in processor.modalities if m in LOADERS)
        self._config = config
        self._processor = processor
        self._cache = cache
        self._workers = workers or ThreadWorkers()
        self._threads = ThreadDecoders(self._workers, config, processor)
        self._decoders = decoders or self._threads
        self._shared_folder = shared_folder
        self._counters = StageCounters()
        self.fetcher = Fetcher(
            config,
            self._workers,
            package_files=package_files,
            on_fetch=lambda seconds, num_bytes: self._counters.add("fetch", seconds, num_bytes),
        )
        self._digests = ItemDigests(processor, self._workers, ids_matter=ids_matter)
        self._elsewhere = elsewhere
        self._questions: SingleFlight[Features | None] = SingleFlight()
        self._preparations: SingleFlight[_Loaded] = SingleFlight()
        self._seen = DigestMemo(MAX_SEEN_URLS)
        self._rules = OptionRules(config, processor, self.modalities)
        self.files = FileOpener(
            config, self.modalities, self.fetcher, self._workers, self._decoders
        )

    async def load(
        self,
        refs: Sequence[MediaRef],
        *,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        media_io_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
        tenant: str = "",
    ) -> list[MediaItem]:
        """Return the items behind ``refs``, in order; embeddings of several items give as many.

        ``tenant`` and ``cache_salt`` scope the callers' ids. Raises the first RequestError or
        UnavailableError of an item, with its ``param``; the loading of the other items is then
        cancelled, unless another request waits for it.
        """
        self.check(refs)
        refs, mm_processor_kwargs = part_options.with_rates(refs, mm_processor_kwargs)
        options = self._rules.of_request(mm_processor_kwargs, media_io_kwargs)
        context = LoadContext.of(self._config, options, tenant=tenant, salt=cache_salt or "")
        for ref in refs:
            context.num_items[ref.modality] += len(ref.uuids) or 1
        try:
            groups = await _all([self._load_ref(ref, self._own(ref, context)) for ref in refs])
        finally:
            self._cache.unpin(context.pinned)
            for digest in context.held:
                self.fetcher.budget.release(digest)
        items = [item for group in groups for item in group]
        limits.check_counts(
            [(i.modality, i.features.precomputed) for i in items], refs, self._config
        )
        return items

    def check(self, refs: Sequence[MediaRef]) -> None:
        """Refuse references that can be refused without loading them. Raises RequestError."""
        for ref in refs:
            limits.check_modality(ref, self.modalities, self._config)
            if ref.kind == "embeds" and not self._config.enable_mm_embeds:
                raise InvalidRequestError(
                    "Precomputed embeddings are not enabled; start with --enable-mm-embeds "
                    "(enable_mm_embeds=True) to accept them.",
                    param=ref.param,
                )
            self._rules.of_item(ref, self._rules.configured)
        limits.check_counts([(r.modality, r.kind == "embeds") for r in refs], refs, self._config)

    def stats(self) -> MediaStats:
        """Return a snapshot of the counters of all stages and of the cache."""
        return self._counters.snapshot(
            self._cache.stats(), self._decoders.stats(), self.fetcher.stats()
        )

    def close(self) -> None:
        """Stop the workers. Nothing may be loading."""
        self.fetcher.close()
        self._decoders.close()
        self._workers.close()

    def _own(self, ref: MediaRef, context: LoadContext) -> LoadContext:
        """Return the context of an item: a copy where the item has options of its own."""
        options = self._rules.of_item(ref, context.options)
        return (
            context if options is context.options else dataclasses.replace(context, options=options)
        )

    async def _load_ref(self, ref: MediaRef, context: LoadContext) -> list[MediaItem]:
        """Load the items of one reference; errors name its place."""
        with located(ref.param or None), self._counters.loading():
            items = (
                await self._load_embeddings(ref, context)
                if ref.kind == "embeds"
                else [await self._load_item(ref, context)]
            )
        is_named = self._digests.ids_matter and (ref.uuid or ref.uuids)
        return [with_content(item) for item in items] if is_named else items

    async def _load_item(self, ref: MediaRef, context: LoadContext) -> MediaItem:
        """Load an item: from the cache by id or text of a ``data:`` URL, else by its content."""
        digest = by_id = self._digests.of_id(ref.modality, ref.uuid, context)
        text_digest = None
        if digest is None and ref.kind == "url" and is_data_url(ref.source):
            text_digest = await self._digests.text(ref.source)
            seen = self._seen.get(text_digest)
            digest = None if seen is None else self._digests.of_content(ref.modality, seen, context)
        if by_id is not None:
            features = await self._by_id(by_id, context)
        else:
            features = None if digest is None else self._lookup(digest, context)
        if digest is not None and features is not None:
            tracing.station("cached", item=ref.param, modality=ref.modality)
            cost = LoadCost(ref.param, cached=True)
            context.needed[digest] = features.num_bytes
            return MediaItem(ref.modality, digest, features, cost)
        if ref.kind == "cached":
            raise MediaNotCachedError(
                f"Nothing is cached under the id {ref.uuid!r:.80}; send the {ref.modality} itself."
            )
        began = time.monotonic()
        fetched = None if ref.kind in ("object", "page") else await self._fetch(ref, context)
        cost = LoadCost(ref.param, fetch_seconds=time.monotonic() - began)
        source = ref.source if fetched is None else fetched.data
        if text_digest is not None and fetched is not None:
            self._seen.put(text_digest, fetched.digest)
        content = b"" if fetched is None else fetched.digest
        if not content and (digest is None or ref.kind == "page"):  # a page's costs nothing
            content = await self._digests.content(source)
        if digest is None:
            digest = self._digests.of_content(ref.modality, content, context)
            features = self._lookup(digest, context)
        if features is None:
            with context.placing(digest):
                features, decoding, processing = await self._preparations.run(
                    digest, lambda: self._prepare(ref, source, digest, content, context)
                )
            if by_id is not None and self._elsewhere is not None:
                self._elsewhere.offer(by_id, features)
            cost = dataclasses.replace(cost, decode_seconds=decoding, preprocess_seconds=processing)
        else:
            tracing.station("cached", item=ref.param, modality=ref.modality)
            cost = dataclasses.replace(cost, cached=True)
        context.needed[digest] = features.num_bytes
        return MediaItem(ref.modality, digest, features, cost)

    async def _fetch(self, ref: MediaRef, context: LoadContext) -> Fetched:
        """Return the encoded file of a reference, fetched if need be.

        Its bytes count against the request's limit; what was downloaded also counts against that of
        all downloads until the request is loaded.
        """
        began = time.monotonic()
        if ref.kind == "bytes":
            fetched = await self._workers.run(_hashed, ref.source)
        else:
            is_data = is_data_url(ref.source)
            async with contextlib.nullcontext() if is_data else context.fetch_slots:
                fetched = await self.fetcher.fetch(ref.source, ref.modality, context.received)
            if not is_data and not is_local(ref.source):
                context.hold(fetched, self.fetcher.budget)
        size = len(fetched.data)
        if ref.kind == "url":
            tracing.station("fetched", began, item=ref.param, modality=ref.modality, bytes=size)
        if size > self._config.max_media_bytes:
            raise MediaTooLargeError(
                f"The {ref.modality} has {size} bytes; at most {self._config.max_media_bytes} are "
                "allowed (--max-media-bytes)."
            )
        context.received.add(size)
        return fetched

    async def _prepare(
        self, ref: MediaRef, source: Any, digest: bytes, content: bytes, context: LoadContext
    ) -> _Loaded:
        cached = self._cache.peek(digest)  # added while the content was fetched?
        if cached is not None:
            return _Loaded(cached, 0.0, 0.0)
        options, num_items = context.options, context.num_items[ref.modality]
        loading = options.loading[ref.modality]
        page = source if isinstance(source, Page) else None
        decode = DecodeJob(
            ref.modality,
            loading,
            options.processing,
            num_items,
            None if page is None else page.index,
        )
        if page is not None:
            page.check_time(self._config.document_timeout)
            source = page.document.data
        prepared = await self._decoded(decode, source, digest, context)
        if page is not None:
            page.document.seconds += prepared.decode_seconds
        prepared.trace(ref.param, ref.modality)
        bare = dataclasses.replace(prepared.features, content=content)
        features = await self._shared(bare, context, digest)
        self._counters.add("decode", prepared.decode_seconds, prepared.decoded_bytes)
        self._counters.add("preprocess", prepared.preprocess_seconds, features.num_bytes)
        self._cache.put(digest, features)
        return _Loaded(features, prepared.decode_seconds, prepared.preprocess_seconds)

    async def _decoded(
        self, job: DecodeJob, source: Any, digest: bytes, context: LoadContext
    ) -> Prepared:
        """Decode an item; where there is no room for it, once more without what is cached.

        Raises as ``Decoders.prepare``.
        """
        decoders = self._decoders if isinstance(source, bytes) else self._threads
        try:
            return await decoders.prepare(job, source)
        except NoRoomError as error:
            context.needed[digest] = error.num_bytes
        except OverloadedError:
            pass
        self._cache.clear()
        return await decoders.prepare(job, source)

    async def _load_embeddings(self, ref: MediaRef, context: LoadContext) -> list[MediaItem]:
        ids = ref.uuids or (ref.uuid,)
        known = [self._digests.of_id(ref.modality, uuid, context) for uuid in ids]
        cached = await _all([self._by_id(digest, context) for digest in known])
        if all(cached):
            return [
                MediaItem(ref.modality, digest, features)
                for digest, features in zip(known, cached, strict=True)
                if digest is not None and features is not None
            ]
        read = await self._workers.run(self._read_embeddings, ref)
        if ref.alone and len(read) > 1:
            raise InvalidEmbeddingsError(
                f"The part holds the embeddings of {len(read)} {ref.modality} items; send one part "
                "per item."
            )
        all_features = []
        for index, features in enumerate(read):
            with context.placing((ref.param, index)):
                all_features.append(await self._shared(features, context, (ref.param, index)))
        if len(ids) == 1 and ids[0] is None:
            known = [None] * len(all_features)
        if len(known) != len(all_features):
            raise InvalidEmbeddingsError(
                f"There {'is' if len(known) == 1 else 'are'} {counted(len(known), 'id')} for the "
                f"embeddings of {counted(len(all_features), ref.modality)}."
            )
        items = []
        for features, digest in zip(all_features, known, strict=True):
            if digest is None:
                content = await self._workers.run(digests.features_digest, features)
                digest = self._digests.of_content(ref.modality, content, context)
            else:
                if self._elsewhere is not None:
                    # Others may have taken other embeddings under this id at the same time.
                    content = await self._workers.run(digests.features_digest, features)
                    features = dataclasses.replace(features, content=content)
                    self._elsewhere.offer(digest, features)
                self._cache.put(digest, features)
            items.append(MediaItem(ref.modality, digest, features))
        return items

    def _read_embeddings(self, ref: MediaRef) -> list[Features]:
        source = decode_embeddings(ref.source, max_bytes=self._config.max_media_bytes)
        try:
            return self._processor.embeddings(ref.modality, source, ref.param)
        except InvalidEmbeddingsError as error:
            if not has_image_shape(ref.source):
                raise
            raise InvalidEmbeddingsError(
                f"{error.message} (With enable_mm_embeds a floating-point tensor of three "
                "dimensions is embeddings: put the tensor of an image into a list, or make it "
                "uint8.)",
                param=error.param,
            ) from None

    async def _shared(self, features: Features, context: LoadContext, item: Hashable) -> Features:
        """Move features to shared memory, if required.

        Raises NoRoomError if it is full, OverloadedError if it cannot be written.
        """
        context.needed[item] = features.num_bytes
        if self._shared_folder is None or isinstance(features.arrays, SharedArrays):
            return features
        try:
            arrays = await self._workers.run(self._shared_folder.write, features.arrays)
        except OSError:
            self._cache.clear()
            try:
                arrays = await self._workers.run(self._shared_folder.write, features.arrays)
            except NoRoomError:
                raise
            except OSError:
                _logger.exception("failed to write features to shared memory")
                raise OverloadedError(NO_ROOM) from None
        return dataclasses.replace(features, arrays=arrays)

    async def _by_id(self, digest: bytes | None, context: LoadContext) -> Features | None:
        """Return what is cached under the digest of a caller's id, here or in another process."""
        if digest is None:
            return None
        found = self._lookup(digest, context)
        if found is None:
            return await self._from_elsewhere(digest, context)
        if self._elsewhere is not None:
            # Again: the process that offered it first may have gone.
            self._elsewhere.offer(digest, found)
        return found

    async def _from_elsewhere(self, digest: bytes, context: LoadContext) -> Features | None:
        """Return what another process has under a caller's id, and keep it here."""
        elsewhere = self._elsewhere
        if elsewhere is None:
            return None

        async def find() -> Features | None:
            found = await elsewhere.find(digest)
            if found is not None:
                found = await self._shared(found, context, digest)
                self._cache.put(digest, found)
            return found

        with context.placing(digest):
            return await self._questions.run(digest, find)

    def _lookup(self, digest: bytes, context: LoadContext) -> Features | None:
        """Look a digest up in the cache, and pin it there until the request is loaded."""
        self._cache.pin([digest])
        context.pinned.append(digest)
        return self._cache.get(digest)


def _hashed(source: bytes | bytearray | memoryview) -> Fetched:
    data = bytes(source)
    return Fetched(data, digests.encoded_digest(data))


async def _all(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return results in order; on a failure or cancellation, cancel and await the others."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
