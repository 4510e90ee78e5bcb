"""Identity of the encoders of a model: where it is equal, embeddings have the same bits."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path

import msgspec

from sensorium import __version__
from sensorium.config import EngineConfig
from sensorium.errors import SensoriumError
from sensorium.models import loader
from sensorium.models.gguf import folder as gguf
from sensorium.models.gguf import split
from sensorium.models.loading.weight_files import identity_of_checkpoint, identity_of_files

logger = logging.getLogger(__name__)

_BY_NUMERICS = ("device", "dtype", "num_threads")
"""Options of the model whose effect on bits is in ``numerics``, whatever they say."""


class Space:
    """The identity of the encoders that one process runs, while its weights' files are the same.

    ``value`` is empty while it is not known, as after a start that may have read files which were
    being replaced. Look once before the weights are read, and after each start.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.value = b""
        self._config = config
        self._files = ""

    async def look_before(self) -> None:
        """Note the files as they are before the weights are read."""
        self._files = await asyncio.to_thread(files_of, self._config)

    async def look(self, numerics: str) -> bytes:
        """Return the identity after a start, by the files before it and now.

        Before the first start there may be none, as a model of the hub is fetched then.
        """
        files = await asyncio.to_thread(files_of, self._config)
        are_same = files == (self._files or files)
        self._files = files
        self.value = space_of(self._config, numerics, files) if are_same else b""
        if not are_same:
            logger.warning(
                "the files of the weights have been replaced since they were read before: which "
                "ones are in memory is not known, so no embeddings are shared"
            )
        return self.value

    def forget(self) -> None:
        """Note that another start has read the weights, perhaps from other files."""
        self.value = b""


def files_of(config: EngineConfig) -> str:
    """Return what tells the files of a model's weights; empty where it cannot be told.

    Reads pieces of the files.
    """
    model = config.model
    if model.load_format == "dummy":
        return ""
    try:
        loaded = loader.read_config_of(model)
    except SensoriumError:  # who loads the model says why
        return ""
    folders = [loaded.folder, *(part.folder for _, part in sorted(loaded.parts.items()))]
    found = [_files_in(Path(folder)) for folder in folders]
    return " ".join(found) if all(found) else ""


def _files_in(folder: Path) -> str:
    file, encoder = gguf.file_of(folder), gguf.encoder_of(folder)
    if file is None:
        return identity_of_checkpoint(folder)
    return identity_of_files([*split.present(file), *([] if encoder is None else [encoder])])


def space_of(config: EngineConfig, numerics: str, files: str) -> bytes:
    """Return what tells the encoders of a model from others; empty where it cannot be told.

    It covers this program, the checkpoint's ``files``, options of the model and of media, and
    ``numerics`` (``engine.loading.numerics``): all that decides the bits of embeddings, besides the
    item, whose digest has the processor's options. How many ranks an engine has decides none, as
    each that encodes has whole encoders.
    """
    if not files or not numerics:
        return b""
    options = {**msgspec.to_builtins(config.model), **dict.fromkeys(_BY_NUMERICS)}
    media = msgspec.to_builtins(config.media)
    plain = msgspec.json.encode((__version__, files, options, media, numerics))
    return hashlib.sha256(plain).digest()[:16]
