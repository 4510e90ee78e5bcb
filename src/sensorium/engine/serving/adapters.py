"""Changes of an engine's adapters, which end even where nobody waits for them any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from sensorium.engine.prompts.adapters import KnownAdapters, check_path, no_path
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.serving.engines import Engines
from sensorium.errors import InvalidRequestError, UnavailableError
from sensorium.models.lora.find import find_adapter, is_downloaded

UNUSED_SECONDS = 300.0
"""Most time that unloading waits for the requests that use an adapter."""


class AdapterChanges:
    """Loads adapters of an engine, one at a time, and unloads them, also meanwhile.

    Each change is a task of its own, which also makes it known to those who prepare prompts: a
    caller that is cancelled meanwhile leaves the engine and what is known of it alike. All methods
    are called on one event loop.
    """

    def __init__(
        self, engine: Engines, processor: InputProcessor, download_dir: str | None
    ) -> None:
        self._engine = engine
        self._processor = processor
        self._download_dir = download_dir
        self._loading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, name: str, path: str) -> None:
        """Load an adapter from a folder or by a Hugging Face id.

        Raises ConfigError when it cannot be used or the name is taken, EngineDeadError when there
        is no engine.
        """
        self._check_stays(name)
        await self._ended(self._load(name, path, unless_loaded=False))

    async def provide(self, name: str, path: str) -> None:
        """Load an adapter unless it is loaded; otherwise as ``load``.

        Raises InvalidRequestError when one of this name came from another place.
        """
        self._check_stays(name)
        if name in self._known:
            self._check_path(name, path)
        elif not path:
            raise no_path(name)
        else:
            await self._ended(self._load(name, path, unless_loaded=True))

    async def unload(self, name: str) -> None:
        """Forget an adapter when the requests that use it have ended; there are no new ones.

        Raises ModelNotFoundError for an unknown name, EngineDeadError when there is no engine, and
        UnavailableError when requests still use it after ``UNUSED_SECONDS``: it stays then.
        """
        with contextlib.ExitStack() as retired:
            retired.enter_context(self._known.retired(name))
            try:
                async with asyncio.timeout(UNUSED_SECONDS):
                    await self._known.unused(name)
            except TimeoutError:
                raise UnavailableError(
                    f"Requests have used the adapter {name!r:.80} for {UNUSED_SECONDS:g} seconds "
                    "since it was to be unloaded: it stays. Try again later.",
                    param="lora_name",
                ) from None
            kept = retired.pop_all()  # no request may come between this and the engine's change
        await self._ended(self._unload(name, kept))

    async def close(self) -> None:
        """End the changes that have not ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _known(self) -> KnownAdapters:
        return self._processor.adapters

    async def _load(self, name: str, path: str, *, unless_loaded: bool) -> None:
        folder = ""  # the engine finds one that is here, beside its steps
        if is_downloaded(path):
            folder = str(await asyncio.to_thread(find_adapter, path, self._download_dir))
        async with self._loading:
            if unless_loaded and name in self._known:
                self._check_path(name, path)
                return
            facts = await self._engine.load_adapter(name, path, folder)
            self._processor.set_facts(facts)

    async def _unload(self, name: str, retired: contextlib.ExitStack) -> None:
        with retired:
            self._known.find(name)  # an engine may have come up without it meanwhile
            self._processor.set_facts(await self._engine.unload_adapter(name))

    def _check_path(self, name: str, path: str) -> None:
        check_path(name, path, [a.path for a in self._known if a.name == name])

    def _check_stays(self, name: str) -> None:
        if self._known.is_retired(name):
            raise InvalidRequestError(
                f"The adapter {name!r:.80} is being unloaded: wait until that has ended.",
                param="lora_name",
            )

    async def _ended(self, change: Coroutine[Any, Any, None]) -> None:
        """Run a change to its end, even when the caller is cancelled."""
        task = asyncio.create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        await asyncio.wait({task})
        task.result()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, where the caller has gone
