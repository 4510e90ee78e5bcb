"""Good requests: what they ask, and what is shown with it."""

from __future__ import annotations

import base64
from typing import Any

from sensorium.assets import AudioAsset, ImageAsset, VideoAsset
from sensorium.multimodal.items import Modality
from tests.fuzz.corpus import corpus, kind_of

_QUESTIONS: dict[Modality, tuple[str, ...]] = {
    "image": ("What is shown?", "How many shapes are there?"),
    "video": ("What happens?",),
    "audio": ("What do you hear?", "Which digits are spoken?"),
}
_FILES: dict[Modality, tuple[str, ...]] = {
    "image": ("png rgb", "png palette", "jpeg exif 6", "webp lossy", "gif", "tiff cmyk", "bmp"),
    "video": ("mp4", "webm", "gif", "mkv variable rate", "avi"),
    "audio": ("wav 16 bit", "flac", "ogg vorbis", "m4a", "mp3"),
}


def good_parts(modalities: tuple[Modality, ...]) -> list[list[dict[str, Any]]]:
    """The parts of messages that a model of these modalities answers, all of them different."""
    found = []
    for modality in modalities:
        for question in _QUESTIONS[modality]:
            text = {"type": "text", "text": question}
            found += [[media_part(modality, url), text] for url in _urls(modality)]
    return found


def media_part(modality: Modality, url: str) -> dict[str, Any]:
    """A part of a message that shows an item."""
    key = f"{modality}_url"
    return {"type": key, key: {"url": url}}


def data_url(data: bytes, kind: str) -> str:
    """The bytes as a base64 ``data:`` URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _urls(modality: Modality) -> list[str]:
    assets = {
        "image": [ImageAsset("stop_sign").data_url],
        "video": [VideoAsset("baby_reading").data_url],
        "audio": [AudioAsset("winning_call").data_url],
    }
    files = [data_url(corpus(modality)[name], kind_of(name, modality)) for name in _FILES[modality]]
    return assets[modality] + files
