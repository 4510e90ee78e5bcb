"""The adapters of an engine by name."""

from __future__ import annotations

import logging
from pathlib import Path

from sensorium.config import EngineConfig
from sensorium.engine.stats import AdapterFacts
from sensorium.errors import ConfigError
from sensorium.models.lora.find import find_adapter
from sensorium.runtime.adapters import AdapterSet

logger = logging.getLogger(__name__)

NOT_ENABLED = (
    "Adapters are not enabled: start with --enable-lora (in Python LLM(..., enable_lora=True))."
)


MOST_NAMES = 1024
"""Names of adapters, of which those of equal content share a place."""


class EngineAdapters:
    """Names of the loaded adapters. Not thread-safe.

    ``lanes``: where their numbers are; None where adapters are not enabled.
    """

    def __init__(self, lanes: AdapterSet | None = None, download_dir: str | None = None) -> None:
        self._lanes = lanes
        self._download_dir = download_dir
        self._known: dict[str, AdapterFacts] = {}

    @classmethod
    def of(cls, lanes: AdapterSet | None, config: EngineConfig) -> EngineAdapters:
        """Return the adapters of a configuration, loaded. Raises ConfigError."""
        adapters = cls(lanes, config.model.download_dir)
        for module in config.lora.modules():
            adapters.load(module.name, module.path)
        return adapters

    @property
    def facts(self) -> tuple[AdapterFacts, ...]:
        """Return the loaded adapters in the order in which they came."""
        return tuple(self._known.values())

    def load(self, name: str, path: str) -> AdapterFacts:
        """Load an adapter from a folder or by a Hugging Face id.

        Raises ConfigError when it cannot be used or the name is taken.
        """
        if self._lanes is None:
            raise ConfigError(NOT_ENABLED, param="enable_lora")
        if name in self._known:
            raise ConfigError(f"An adapter {name!r:.80} is loaded already.", param="lora_name")
        if len(self._known) >= MOST_NAMES:
            raise ConfigError(f"There are {MOST_NAMES} adapters, the most.", param="max_loras")
        try:
            found = self._lanes.load(Path(find_adapter(path, self._download_dir)))
        except ConfigError as error:
            message = f"Adapter {name!r:.80}: {error.message}"
            raise ConfigError(message, param=error.param) from error
        facts = AdapterFacts(name, path, found.digest, found.rank, found.in_encoder)
        self._known[name] = facts
        logger.info(
            "loaded adapter %r of rank %d; adapters take %.1f MiB",
            name,
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
