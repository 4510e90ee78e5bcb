"""Requests with a constraint, on the engine's side.

Their matchers are made while the engine goes on.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from sensorium.core.request import EngineRequest
from sensorium.errors import ConfigError
from sensorium.multimodal.items import Features
from sensorium.text.grammar.grammar import Budget, GrammarMatcher, GrammarVocabulary

logger = logging.getLogger(__name__)

NOT_STARTED = "The grammar of structured_outputs could not be started."

NO_VOCABULARY = (
    "Structured outputs are not available: this model's tokenizer cannot be used for them."
)

NUM_THREADS = 2
"""Matchers that are made at a time; the library releases the interpreter's lock meanwhile."""

NUM_KEPT = 64
"""Grammars of which a matcher is kept, so that the samples of a request, and requests that are
alike, share it."""


class Matchers:
    """Makes matchers.

    The vocabulary that they share is read at the first one, which takes about a second.
    """

    def __init__(self, folder: str, vocab_size: int) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._vocabulary: GrammarVocabulary | ConfigError | None = None
        self._kept: OrderedDict[str, GrammarMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, grammar: str, budget: Budget) -> GrammarMatcher:
        """A matcher at the start of ``grammar``; usable from several threads.

        Raises InvalidRequestError.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read()
            vocabulary = self._vocabulary
            kept = self._kept.get(grammar)
        if isinstance(vocabulary, ConfigError):
            raise ConfigError(vocabulary.message)
        if kept is None:
            kept = vocabulary.matcher(grammar)
        with self._lock:
            self._kept[grammar] = kept
            self._kept.move_to_end(grammar)
            if len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)
            return kept.fresh(budget)

    def _read(self) -> GrammarVocabulary | ConfigError:
        """The vocabulary, or what to say for ever when there can be none."""
        try:
            return GrammarVocabulary.from_folder(self._folder, self._vocab_size)
        except Exception:
            logger.exception("the tokenizer cannot be used for structured outputs")
            return ConfigError(NO_VOCABULARY)


@dataclass(slots=True)
class _Entry:
    request: EngineRequest
    features: tuple[Features, ...]
    matcher: concurrent.futures.Future[GrammarMatcher]


@dataclass(frozen=True, slots=True)
class ReadyRequest:
    """A request whose matcher is made and stands in the place of its grammar.

    Or that failed, with a message.
    """

    request: EngineRequest
    features: tuple[Features, ...]
    error: str | None = None


class ConstrainedRequests:
    """Requests that wait for their matchers. One thread calls it; others make the matchers."""

    def __init__(self, new_matcher: Callable[[str, Budget], GrammarMatcher]) -> None:
        self._new_matcher = new_matcher
        self._budgets: weakref.WeakValueDictionary[str, Budget] = weakref.WeakValueDictionary()
        self._pool = concurrent.futures.ThreadPoolExecutor(NUM_THREADS, "sensorium-matchers")
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._entries

    def put(self, request: EngineRequest, features: tuple[Features, ...]) -> None:
        """Begin to make the matcher of a request."""
        # Held by the matchers of all samples of the request, and gone with them.
        budget = self._budgets.setdefault(request.request_id.partition("#")[0], Budget())
        made = self._pool.submit(self._new_matcher, request.grammar, budget)
        self._entries[request.request_id] = _Entry(request, features, made)

    def discard(self, request_id: str) -> None:
        """The request is not wanted any more; unknown ids are ignored."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            entry.matcher.cancel()

    def clear(self) -> None:
        """No request is wanted any more."""
        for request_id in list(self._entries):
            self.discard(request_id)

    def take(self, seconds: float) -> list[ReadyRequest]:
        """The requests whose matchers are made; waits so long for a first one."""
        waiting = [entry.matcher for entry in self._entries.values()]
        concurrent.futures.wait(waiting, seconds, concurrent.futures.FIRST_COMPLETED)
        done = [i for i, entry in self._entries.items() if entry.matcher.done()]
        return [self._arrival(self._entries.pop(request_id)) for request_id in done]

    def _arrival(self, entry: _Entry) -> ReadyRequest:
        try:
            request = dataclasses.replace(entry.request, grammar=entry.matcher.result())
        except ConfigError as error:
            return ReadyRequest(entry.request, entry.features, error.message)
        except Exception:
            logger.exception("a grammar could not be started")
            return ReadyRequest(entry.request, entry.features, NOT_STARTED)
        return ReadyRequest(request, entry.features)
