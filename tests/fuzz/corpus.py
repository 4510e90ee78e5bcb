"""All files to damage, by modality and name; made once per process."""

from __future__ import annotations

import functools

from sensorium.multimodal.items import Modality
from tests.fuzz.audio import audio
from tests.fuzz.images import images
from tests.fuzz.videos import videos

_MAKERS = {"image": images, "video": videos, "audio": audio}


@functools.cache
def corpus(modality: Modality) -> dict[str, bytes]:
    """Small real files: each is decoded as it stands, or refused for what it is."""
    return _MAKERS[modality]()


def kind_of(name: str, modality: Modality) -> str:
    """The content type of a file of the corpus, as an honest client names it."""
    first = name.split()[0]
    known = {"apng": "png", "pgm": "x-portable-anymap", "mkv": "x-matroska", "m4a": "mp4"}
    return f"{modality}/{known.get(first, first)}"
