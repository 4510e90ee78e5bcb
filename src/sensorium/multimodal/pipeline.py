"""References in, items out: guard, fetch, digest, cache, decode and preprocess, concurrently and each thing once."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sensorium import tracing
from sensorium.config import MediaConfig
from sensorium.errors import (
    InvalidEmbeddingsError,
    InvalidRequestError,
    MediaNotCachedError,
    MediaTooLargeError,
    OverloadedError,
    RequestError,
    TooManyItemsError,
    UnavailableError,
    UnsupportedModalityError,
    counted,
)
from sensorium.multimodal.cache import digest as digests
from sensorium.multimodal.cache.features import DigestMemo, FeatureCache
from sensorium.multimodal.cache.single_flight import SingleFlight
from sensorium.multimodal.decode.loaders import LOADERS, DecodeJob
from sensorium.multimodal.fetch.budget import RequestBytes
from sensorium.multimodal.fetch.downloads import Downloads
from sensorium.multimodal.fetch.fetcher import Fetcher, is_local
from sensorium.multimodal.items import Features, MediaItem, MediaRef, Modality
from sensorium.multimodal.parse import part_options
from sensorium.multimodal.parse.data import looks_like_a_picture
from sensorium.multimodal.parse.embeddings import decode_embeddings
from sensorium.multimodal.parse.item_options import ItemOptions, OptionRules
from sensorium.multimodal.processor import Processor
from sensorium.multimodal.shared_memory import SharedArrays, SharedArraysFolder
from sensorium.multimodal.stats import MediaStats, StageCounters
from sensorium.multimodal.workers.decode_worker import NO_ROOM
from sensorium.multimodal.workers.pool import Decoders, ThreadDecoders
from sensorium.multimodal.workers.threads import ThreadWorkers

MAX_SEEN_URLS = 4096
HASHED_AT_ONCE = 1 << 19
"""Characters of a ``data:`` URL that the event loop hashes itself: a quarter of a millisecond."""

T = TypeVar("T")
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Job:
    """What the items of one request share. Written by ``MediaPipeline`` only."""

    options: ItemOptions
    tenant: str
    salt: str
    fetch_slots: asyncio.Semaphore
    received: RequestBytes
    num_items: Counter[Modality] = field(default_factory=Counter)
    pinned: list[bytes] = field(default_factory=list)
    held: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Content:
    """An encoded file with its content digest, or a caller's object without one yet."""

    source: Any
    digest: bytes | None = None


class MediaPipeline:
    """Loads the media of requests for one model.

    ``decoders`` take encoded files; without them threads of this process do. ``segments``: where all features are to
    lie, so that another process can open them; they lie where they were made without it. ``ids_matter``: False when
    neither the processor cache nor the prefix cache is on, so that a caller's ids would change nothing; they are then
    ignored, with one warning. Usable from several event loops.
    """

    def __init__(
        self,
        config: MediaConfig,
        processor: Processor,
        cache: FeatureCache,
        *,
        workers: ThreadWorkers | None = None,
        decoders: Decoders | None = None,
        segments: SharedArraysFolder | None = None,
        fetcher: Fetcher | None = None,
        package_files: bool = False,
        ids_matter: bool = True,
    ) -> None:
        self.modalities = tuple(m for m in processor.modalities if m in LOADERS)
        self._config = config
        self._processor = processor
        self._cache = cache
        self._workers = workers or ThreadWorkers()
        self._threads = ThreadDecoders(self._workers, config, processor)
        self._decoders = decoders or self._threads
        self._segments = segments
        self._fetcher = fetcher or Fetcher(config, self._workers, package_files=package_files)
        self._ids_matter = ids_matter
        self._warned_of_ids = False
        self._preparations: SingleFlight[Features] = SingleFlight()
        self._seen = DigestMemo(MAX_SEEN_URLS)
        self._counters = StageCounters()
        self._downloads = Downloads(
            config,
            self._fetcher,
            self._workers,
            on_fetch=lambda seconds, num_bytes: self._counters.add("fetch", seconds, num_bytes),
        )
        self._rules = OptionRules(config, processor, self.modalities)

    async def load(
        self,
        refs: Sequence[MediaRef],
        *,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        media_io_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
        tenant: str = "",
    ) -> list[MediaItem]:
        """The items behind ``refs``, in order; embeddings of several items give as many.

        ``tenant`` and ``cache_salt`` scope the callers' ids. Raises the first item's error to come up, a RequestError
        with the item's ``param``; the loading of the others is then cancelled, unless another request waits for it.
        """
        self.check(refs)
        refs, mm_processor_kwargs = part_options.with_rates(refs, mm_processor_kwargs)
        options = self._rules.of_request(mm_processor_kwargs, media_io_kwargs)
        job = self._new_job(options, tenant, cache_salt)
        for ref in refs:  # as many as where they are named by their ids alone
            job.num_items[ref.modality] += len(ref.uuids) or 1
        try:
            groups = await _all([self._load_ref(ref, self._job_of(ref, job)) for ref in refs])
        finally:
            self._cache.unpin(job.pinned)
            for digest in job.held:
                self._fetcher.budget.release(digest)
        items = [item for group in groups for item in group]
        self._check_counts(
            Counter(
                i.modality
                for i in items
                if not self._needs_none(i.modality, i.features.precomputed)
            ),
            refs,
            len(items),
        )
        return items

    def check(self, refs: Sequence[MediaRef]) -> None:
        """Refuse what needs no loading to be refused: modalities, counts, embeddings that are not enabled."""
        for ref in refs:
            if ref.modality not in self.modalities:
                takes = f"takes {', '.join(self.modalities)}" if self.modalities else "takes text"
                raise UnsupportedModalityError(
                    f"This model {takes} only; it has no {ref.modality} input.", param=ref.param
                )
            if ref.kind == "embeds" and not self._config.enable_mm_embeds:
                raise InvalidRequestError(
                    "Precomputed embeddings are not enabled; start with --enable-mm-embeds "
                    "(enable_mm_embeds=True) to accept them.",
                    param=ref.param,
                )
            self._rules.of_item(ref, self._rules.configured)
        counted_refs = (
            ref.modality for ref in refs if not self._needs_none(ref.modality, ref.kind == "embeds")
        )
        self._check_counts(Counter(counted_refs), refs, len(refs))

    def stats(self) -> MediaStats:
        """A snapshot of the counters of all stages and of the cache."""
        counted = self._counters.snapshot(self._cache.stats(), self._decoders.stats())
        return dataclasses.replace(counted, downloads=self._downloads.stats())

    def close(self) -> None:
        """Free the workers. Nothing may be loading."""
        self._downloads.close()
        self._decoders.close()
        self._workers.close()

    def _new_job(self, options: ItemOptions, tenant: str, salt: str | None) -> _Job:
        return _Job(
            options=options,
            tenant=tenant,
            salt=salt or "",
            fetch_slots=asyncio.Semaphore(self._config.max_media_fetches_per_request),
            received=RequestBytes(self._config.max_request_media_bytes),
        )

    def _job_of(self, ref: MediaRef, job: _Job) -> _Job:
        """The job of a reference: one with its own options where it has some."""
        options = self._rules.of_item(ref, job.options)
        return job if options is job.options else dataclasses.replace(job, options=options)

    def _needs_none(self, modality: Modality, precomputed: bool) -> bool:
        """Whether an item passes a limit of 0: embeddings do, which need no encoder."""
        return precomputed and self._config.limit(modality) == 0

    def _check_counts(
        self, counts: Counter[Modality], refs: Sequence[MediaRef], total: int
    ) -> None:
        for modality, count in counts.items():
            limit = self._config.limit(modality)
            if limit is not None and count > limit:
                beyond = [ref for ref in refs if ref.modality == modality][limit:]
                raise TooManyItemsError(
                    f"The prompt has {counted(count, f'{modality} item')}; at most {limit} "
                    f"{'is' if limit == 1 else 'are'} allowed (--limit-mm-per-prompt).",
                    param=beyond[0].param if beyond else None,
                )
        most = self._config.max_items_per_request
        if total > most:
            raise TooManyItemsError(
                f"The request has {total} media items; at most {most} are allowed "
                "(--max-items-per-request).",
                param=refs[most].param if len(refs) > most else None,
            )

    async def _load_ref(self, ref: MediaRef, job: _Job) -> list[MediaItem]:
        """The items of one reference. Errors are given this reference's ``param``; shared ones are copied for it."""
        try:
            with self._counters.loading():
                items = (
                    await self._load_embeddings(ref, job)
                    if ref.kind == "embeds"
                    else [await self._load_item(ref, job)]
                )
            named = self._ids_matter and (ref.uuid or ref.uuids)
            return [_sized(item) for item in items] if named else items
        except UnavailableError as error:
            self._counters.add_failure(error.code)
            copy = type(error)(error.message, param=error.param)
            copy.retry_after = error.retry_after
            raise copy from None
        except RequestError as error:
            self._counters.add_failure(error.code)
            raise type(error)(error.message, param=error.param or ref.param or None) from None

    async def _load_item(self, ref: MediaRef, job: _Job) -> MediaItem:
        """One item: by its id or, for a ``data:`` URL, by its text, if that is known; else by its content."""
        digest = self._id_digest(ref.modality, ref.uuid, job)
        text_digest = None
        if digest is None and _is_data_url(ref):
            text_digest = await self._text_digest(ref.source)
            seen = self._seen.get(text_digest)
            digest = None if seen is None else self._item_digest(ref.modality, seen, job)
        features = None if digest is None else self._lookup(digest, job)
        if digest is not None and features is not None:
            tracing.station("cached", item=ref.param, modality=ref.modality)
            return MediaItem(ref.modality, digest, features)
        if ref.kind == "cached":
            raise MediaNotCachedError(
                f"Nothing is cached under the id {ref.uuid!r:.80}; send the {ref.modality} itself."
            )
        began = time.monotonic()
        content = await self._content(ref, job)
        if ref.kind == "url":
            size = len(content.source)
            tracing.station("fetched", began, item=ref.param, modality=ref.modality, bytes=size)
        if text_digest is not None and content.digest is not None:
            self._seen.put(text_digest, content.digest)
        if digest is None:
            identity = content.digest
            if identity is None:
                identity = await self._workers.run(digests.object_digest, content.source)
            digest = self._item_digest(ref.modality, identity, job)
            features = self._lookup(digest, job)
        if features is None:
            features = await self._preparations.run(
                digest, lambda: self._prepare(ref, content.source, digest, job)
            )
        else:
            tracing.station("cached", item=ref.param, modality=ref.modality)
        return MediaItem(ref.modality, digest, features)

    async def _content(self, ref: MediaRef, job: _Job) -> _Content:
        """The encoded file, fetched if need be, or the caller's object. Bytes count against the request's limit, and
        what was downloaded against that of all downloads, until the request is loaded."""
        if ref.kind == "object":
            return _Content(ref.source)
        if ref.kind == "bytes":
            content = await self._workers.run(_encoded, bytes(ref.source))
        elif _is_data_url(ref):
            data = await self._fetcher.fetch(ref.source, ref.modality)
            content = await self._workers.run(_encoded, data)
        else:
            async with job.fetch_slots:
                download = await self._downloads.get(ref.source, ref.modality, job.received)
            content = _Content(download.data, download.digest)
            if not is_local(ref.source):
                self._fetcher.budget.hold(download.digest, len(download.data))
                job.held.append(download.digest)
        size = len(content.source)
        if size > self._config.max_media_bytes:
            raise MediaTooLargeError(
                f"The {ref.modality} has {size} bytes; at most {self._config.max_media_bytes} are allowed "
                "(--max-media-bytes)."
            )
        job.received.add(size)
        return content

    async def _prepare(self, ref: MediaRef, source: Any, digest: bytes, job: _Job) -> Features:
        held = self._cache.peek(digest)  # it may have come while the content was fetched
        if held is not None:
            return held
        options, num_items = job.options, job.num_items[ref.modality]
        loading = options.loading[ref.modality]
        decode = DecodeJob(ref.modality, loading, options.processing, num_items)
        decoders = self._decoders if isinstance(source, bytes) else self._threads
        try:
            prepared = await decoders.prepare(decode, source)
        except OverloadedError:  # no room for the result
            self._cache.clear()
            prepared = await decoders.prepare(decode, source)
        prepared.trace(ref.param, ref.modality)
        features = await self._shared(prepared.features)
        self._counters.add("decode", prepared.decode_seconds, prepared.decoded_bytes)
        self._counters.add("preprocess", prepared.preprocess_seconds, features.num_bytes)
        self._cache.put(digest, features)
        return features

    async def _load_embeddings(self, ref: MediaRef, job: _Job) -> list[MediaItem]:
        ids = ref.uuids or (ref.uuid,)
        known = [self._id_digest(ref.modality, uuid, job) for uuid in ids]
        held = [None if digest is None else self._lookup(digest, job) for digest in known]
        if all(held):
            return [
                MediaItem(ref.modality, digest, features)
                for digest, features in zip(known, held, strict=True)
                if digest is not None and features is not None
            ]
        read = await self._workers.run(self._read_embeddings, ref)
        if ref.alone and len(read) > 1:
            raise InvalidEmbeddingsError(
                f"The part holds the embeddings of {len(read)} {ref.modality} items; send one part per item."
            )
        all_features = [await self._shared(features) for features in read]
        if len(ids) == 1 and ids[0] is None:
            known = [None] * len(all_features)
        if len(known) != len(all_features):
            raise InvalidEmbeddingsError(
                f"There {'is' if len(known) == 1 else 'are'} {counted(len(known), 'id')} for the embeddings of "
                f"{counted(len(all_features), ref.modality)}."
            )
        items = []
        for features, digest in zip(all_features, known, strict=True):
            if digest is None:
                content = await self._workers.run(digests.features_digest, features)
                digest = self._item_digest(ref.modality, content, job)
            else:
                self._cache.put(digest, features)
            items.append(MediaItem(ref.modality, digest, features))
        return items

    def _read_embeddings(self, ref: MediaRef) -> list[Features]:
        source = decode_embeddings(ref.source, max_bytes=self._config.max_media_bytes)
        try:
            return self._processor.embeddings(ref.modality, source, ref.param)
        except InvalidEmbeddingsError as error:
            if not looks_like_a_picture(ref.source):
                raise
            raise InvalidEmbeddingsError(
                f"{error.message} (With enable_mm_embeds a floating-point tensor of three dimensions is embeddings: "
                "put the tensor of a picture into a list, or make it uint8.)",
                param=error.param,
            ) from None

    async def _shared(self, features: Features) -> Features:
        """The same features in a segment, where they have to be in one. Raises OverloadedError without room for it."""
        if self._segments is None or isinstance(features.arrays, SharedArrays):
            return features
        try:
            arrays = await self._workers.run(self._segments.write, features.arrays)
        except OSError:
            self._cache.clear()
            try:
                arrays = await self._workers.run(self._segments.write, features.arrays)
            except OSError:
                _logger.exception("features could not be written to shared memory")
                raise OverloadedError(NO_ROOM) from None
        return dataclasses.replace(features, arrays=arrays)

    async def _text_digest(self, url: str) -> bytes:
        """Of a short URL at once: a thread would take longer to begin than the hash of half a megabyte takes."""
        if len(url) <= HASHED_AT_ONCE:
            return digests.text_digest(url)
        return await self._workers.run(digests.text_digest, url)

    def _id_digest(self, modality: Modality, uuid: str | None, job: _Job) -> bytes | None:
        """The item digest under a caller's id; None without one, or when ids are ignored."""
        if uuid is None:
            return None
        if not self._ids_matter:
            if not self._warned_of_ids:
                self._warned_of_ids = True
                _logger.warning(
                    "multi_modal_uuids are ignored: the processor cache and prefix caching are both off"
                )
            return None
        content = digests.uuid_digest(modality, uuid, tenant=job.tenant, salt=job.salt)
        return self._item_digest(modality, content, job)

    def _item_digest(self, modality: Modality, content: bytes, job: _Job) -> bytes:
        return digests.item_digest(
            modality,
            content,
            dataclasses.asdict(job.options.loading[modality]),
            self._processor.identity(modality, job.options.processing, job.num_items[modality]),
        )

    def _lookup(self, digest: bytes, job: _Job) -> Features | None:
        """Look into the cache, and keep what is under the digest there until the request is loaded."""
        self._cache.pin([digest])
        job.pinned.append(digest)
        return self._cache.get(digest)


def _sized(item: MediaItem) -> MediaItem:
    """An item that a caller named, with its length in its digest: under a name used again for something of another
    length, embeddings that were kept would not fit."""
    digest = digests.framed("sized", [item.digest, item.features.num_embeds])
    return dataclasses.replace(item, digest=digest)


def _is_data_url(ref: MediaRef) -> bool:
    return ref.kind == "url" and ref.source[:5].lower() == "data:"


def _encoded(data: bytes) -> _Content:
    return _Content(data, digests.encoded_digest(data))


async def _all(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; when one fails, or the caller is cancelled, the others are cancelled and waited for."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
