"""The adapters of an engine by name."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sensorium.config import EngineConfig
from sensorium.engine.stats import AdapterFacts
from sensorium.errors import ConfigError
from sensorium.models.lora.find import find_adapter
from sensorium.models.lora.read import Adapter
from sensorium.runtime.adapters import AdapterSet

logger = logging.getLogger(__name__)

NOT_ENABLED = (
    "Adapters are not enabled: start with --enable-lora (in Python LLM(..., enable_lora=True))."
)


MOST_NAMES = 1024
"""Names of adapters, of which those of equal content share a place."""


@dataclass(frozen=True, slots=True, eq=False)
class NamedAdapter:
    """An adapter that was read, with its name, its path as it was given, and its folder."""

    name: str
    path: str
    folder: str
    adapter: Adapter


class EngineAdapters:
    """Names of the loaded adapters. Not thread-safe, but for ``read``.

    ``lanes``: where their numbers are; None where adapters are not enabled.
    """

    def __init__(self, lanes: AdapterSet | None = None, download_dir: str | None = None) -> None:
        self._lanes = lanes
        self._download_dir = download_dir
        self._known: dict[str, AdapterFacts] = {}

    @classmethod
    def of(
        cls, lanes: AdapterSet | None, config: EngineConfig, folders: Mapping[str, Path]
    ) -> EngineAdapters:
        """Return the adapters of a configuration, loaded from ``folders``. Raises ConfigError."""
        adapters = cls(lanes, config.model.download_dir)
        for module in config.lora.modules():
            adapters.load(module.name, module.path, str(folders[module.name]))
        return adapters

    @property
    def facts(self) -> tuple[AdapterFacts, ...]:
        """Return the loaded adapters in the order in which they came."""
        return tuple(self._known.values())

    @property
    def max_loras(self) -> int:
        """Return the most adapters that are loaded; 0 where they are not enabled."""
        return 0 if self._lanes is None else self._lanes.max_loras

    @property
    def nbytes(self) -> int:
        """Return the bytes of all adapters."""
        return 0 if self._lanes is None else self._lanes.nbytes

    @property
    def most_bytes(self) -> int:
        """Return the most bytes of all adapters."""
        return 0 if self._lanes is None else self._lanes.most_bytes

    def names(self, digests: Collection[bytes]) -> list[str]:
        """Return the names of the adapters with these digests."""
        return [name for name, facts in self._known.items() if facts.digest in digests]

    def load(self, name: str, path: str, folder: str = "") -> AdapterFacts:
        """Load an adapter from a folder or by a Hugging Face id; raises as ``read`` and ``add``."""
        return self.add(self.read(name, path, folder))

    def read(
        self,
        name: str,
        path: str,
        folder: str = "",
        progress: Callable[[], object] | None = None,
    ) -> NamedAdapter:
        """Read an adapter. Other threads may call it while this one uses the adapters.

        path: a folder or a Hugging Face id. folder: where it is, if it has been found already.
        progress: called after each of its modules. Raises ConfigError when it cannot be used or the
        name is taken.
        """
        if self._lanes is None:
            raise ConfigError(NOT_ENABLED, param="enable_lora")
        self._check_name(name)
        with named(name):
            found = Path(folder) if folder else find_adapter(path, self._download_dir)
            return NamedAdapter(name, path, str(found), self._lanes.read(found, progress))

    def bytes_of(self, name: str, path: str) -> tuple[str, int]:
        """Return the folder of an adapter, downloaded if need be, and the memory it will take.

        Raises ConfigError when it cannot be used.
        """
        if self._lanes is None:
            raise ConfigError(NOT_ENABLED, param="enable_lora")
        with named(name):
            found = find_adapter(path, self._download_dir)
            return str(found), self._lanes.bytes_of(found)

    def add(self, found: NamedAdapter) -> AdapterFacts:
        """Take an adapter that was read. Raises ConfigError when there is no room for it."""
        assert self._lanes is not None
        self._check_name(found.name)
        with named(found.name):
            loaded = self._lanes.add(found.adapter)
        facts = AdapterFacts(
            found.name,
            found.path,
            loaded.digest,
            loaded.rank,
            loaded.in_encoder,
            found.folder,
            loaded.nbytes,
        )
        self._known[found.name] = facts
        logger.info(
            "loaded adapter %r of rank %d; adapters take %.1f MiB",
            found.name,
            facts.rank,
            self._lanes.nbytes / (1 << 20),
        )
        return facts

    def unload(self, name: str) -> None:
        """Forget an adapter that no request uses. Raises ConfigError for an unknown name."""
        facts = self._known.pop(name, None)
        if facts is None or self._lanes is None:
            raise ConfigError(f"There is no adapter {name!r:.80}.", param="lora_name")
        self._lanes.unload(facts.digest)
        logger.info("unloaded adapter %r", name)

    def _check_name(self, name: str) -> None:
        """Raise ConfigError for a name that cannot be added."""
        if name in self._known:
            raise ConfigError(f"An adapter {name!r:.80} is loaded already.", param="lora_name")
        if len(self._known) >= MOST_NAMES:
            raise ConfigError(f"There are {MOST_NAMES} adapters, the most.", param="max_loras")


def found_adapters(config: EngineConfig) -> dict[str, Path]:
    """Return the folders of the adapters of a configuration by their names.

    Those of the Hugging Face hub are downloaded. Raises ConfigError for one that is not there or,
    as far as its configuration says, cannot be used; before the model is loaded, so that nobody
    waits for that in vain.
    """
    folders = {}
    for name, path in config.lora.modules():
        with named(name):
            folders[name] = find_adapter(path, config.model.download_dir)
    return folders


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Put an adapter's name before the errors of the block."""
    try:
        yield
    except ConfigError as error:
        message = f"Adapter {name!r:.80}: {error.message}"
        raise ConfigError(message, param=error.param) from error
