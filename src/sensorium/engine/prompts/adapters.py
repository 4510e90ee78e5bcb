"""The adapters that requests may name, and how many requests use each."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from sensorium.engine.prompts.types import PreparedPrompt
from sensorium.engine.stats import AdapterFacts
from sensorium.errors import InvalidRequestError, ModelNotFoundError


class KnownAdapters:
    """The adapters of an engine by name, as its facts have them. Used by one thread.

    A *retired* one gets no further requests.
    """

    def __init__(self) -> None:
        self._known: dict[str, AdapterFacts] = {}
        self._retired: set[str] = set()
        self._in_use: Counter[str] = Counter()
        self._waiting: dict[str, asyncio.Event] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._known and name not in self._retired

    def __iter__(self) -> Iterator[AdapterFacts]:
        """Return the adapters that requests may name."""
        return iter([a for a in self._known.values() if a.name not in self._retired])

    def is_retired(self, name: str) -> bool:
        """Return True for one that gets no further requests, and is not gone yet."""
        return name in self._retired

    def set(self, adapters: Iterable[AdapterFacts]) -> None:
        """Replace what is known."""
        self._known = {adapter.name: adapter for adapter in adapters}
        self._retired &= self._known.keys()

    def find(self, name: str) -> AdapterFacts | None:
        """Return an adapter; None for the empty name. Raises ModelNotFoundError."""
        if not name:
            return None
        if name not in self._known:
            raise ModelNotFoundError(f"The adapter {name!r:.80} is not loaded.", param="model")
        return self._known[name]

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Count a request while it uses an adapter, or none. Raises ModelNotFoundError."""
        if not name:
            yield
            return
        if name not in self:
            raise ModelNotFoundError(f"The adapter {name!r:.80} is not loaded.", param="model")
        self._in_use[name] += 1
        try:
            yield
        finally:
            self._in_use[name] -= 1
            if not self._in_use[name]:
                del self._in_use[name]
                if name in self._waiting:
                    self._waiting[name].set()

    @contextmanager
    def retired(self, name: str) -> Iterator[None]:
        """Let no further request use an adapter within the block. Raises ModelNotFoundError."""
        if name not in self:
            raise ModelNotFoundError(f"There is no adapter {name!r:.80}.", param="lora_name")
        self._retired.add(name)
        try:
            yield
        finally:
            self._retired.discard(name)

    async def unused(self, name: str) -> None:
        """Wait until no request uses a retired adapter."""
        if name not in self._in_use:
            return
        self._waiting[name] = asyncio.Event()
        try:
            await self._waiting[name].wait()
        finally:
            self._waiting.pop(name, None)


def check_path(name: str, path: str, known: Iterable[str]) -> None:
    """Raise InvalidRequestError for a path that is not one of those a loaded adapter came by.

    The empty path means the adapter that is loaded.
    """
    if path and path not in known:
        raise InvalidRequestError(
            f"The adapter {name!r:.80} was loaded from another folder: give this one another name.",
            param="lora_request",
        )


def no_path(name: str) -> InvalidRequestError:
    """Return the error of an adapter that is neither loaded nor has a path."""
    return InvalidRequestError(
        f"The adapter {name!r:.80} is not loaded: give its lora_path.", param="lora_request"
    )


def with_adapter(prepared: PreparedPrompt, adapter: AdapterFacts | None) -> PreparedPrompt:
    """Return a prompt for an adapter.

    Only an adapter that changes the encoder makes other embeddings of an item than the model does;
    the digests of the items then tell it.
    """
    if adapter is None:
        return prepared
    spans = prepared.spans
    if adapter.in_encoder:
        spans = tuple(dataclasses.replace(s, digest=_own(s.digest, adapter)) for s in spans)
    return dataclasses.replace(prepared, adapter=adapter.digest, spans=spans)


def _own(digest: bytes, adapter: AdapterFacts) -> bytes:
    return hashlib.sha256(b"adapter\0" + adapter.digest + digest).digest()
