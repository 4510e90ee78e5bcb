"""Limits and rules for images, videos and sounds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sensorium.config.fields import (
    MIB,
    bad,
    check_choice,
    check_integer,
    check_number,
    check_types,
    option,
)

LIMITED = ("image", "video", "audio")
"""Keys of ``limit_mm_per_prompt``."""


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """Limits and rules for images, videos and sounds."""

    limit_mm_per_prompt: dict[str, Any] = option(
        dict,
        'Most items per prompt, such as {"image": 2} or image=2; 0 switches a modality off.',
        factory=True,
    )
    mm_processor_kwargs: dict[str, Any] = option(
        dict, 'Options of the model\'s processor, such as {"max_pixels": 1003520}.', factory=True
    )
    media_io_kwargs: dict[str, dict[str, Any]] = option(
        dict,
        'Options of loading, such as {"image": {"rgba_background_color": [255, 255, 255]}}.',
        factory=True,
    )
    enable_mm_embeds: bool = option(False, "Accept precomputed embeddings as input.")
    allowed_local_media_path: str = option(
        "", "Folder below which file: URLs and local paths may be read; none when empty."
    )
    allowed_media_domains: tuple[str, ...] = option(
        (), "Hosts that may be fetched from; any public host when empty."
    )
    media_url_allow_redirects: bool = option(True, "Follow redirects of media URLs.")
    max_media_redirects: int = option(5, "Most redirects of one download.")
    image_fetch_timeout: float = option(5.0, "Seconds for the whole download of an image.")
    video_fetch_timeout: float = option(30.0, "Seconds for the whole download of a video.")
    audio_fetch_timeout: float = option(10.0, "Seconds for the whole download of a sound.")
    media_fetch_retries: int = option(
        3, "Times that a download is tried again after a failure that may pass, within its seconds."
    )
    max_media_connections: int = option(
        128, "Most connections to media hosts at a time; further downloads wait."
    )
    max_media_connections_per_host: int = option(
        32, "Most connections to one media host at a time; further downloads wait."
    )
    max_media_fetches_per_request: int = option(
        8, "Most downloads of one request at a time; its further ones wait."
    )
    max_media_bytes_in_flight: int = option(
        2048 * MIB,
        "Most bytes of downloads together, unfinished ones and finished ones that wait to be decoded; what is past "
        "it gets 503.",
    )
    media_url_reuse_seconds: float = option(
        1.0,
        "Seconds for which a finished download serves further requests for its URL, unless its host forbids "
        "storing it; 0: only those that come while it runs.",
    )
    media_url_reuse_bytes: int = option(
        64 * MIB, "Most bytes of finished downloads that are kept for such requests."
    )
    media_download_cache: str = option(
        "",
        "Folder that keeps downloads between requests and restarts, as far as their hosts allow; none when empty.",
    )
    media_download_cache_gb: float = option(
        10.0, "GiB of that folder; what was used least recently goes first."
    )
    max_media_bytes: int = option(256 * MIB, "Most bytes of one download.")
    max_request_media_bytes: int = option(
        256 * MIB, "Most bytes of all media of a request, counted as they come."
    )
    max_image_pixels: int = option(
        178_956_970, "Most pixels of one image, or of a frame of a video."
    )
    max_video_frames: int = option(
        36_000,
        "Most frames of one video that are decoded to get at those that are sampled; those larger than 1920 x 1088 "
        "count as several.",
    )
    max_video_pixels: int = option(
        536_870_912, "Most pixels of the sampled frames of one video together."
    )
    max_audio_seconds: int = option(600, "Most seconds of one sound.")
    max_audio_decoded_bytes: int = option(
        256 * MIB, "Most bytes of one sound when it is decoded, all its channels together."
    )
    max_items_per_request: int = option(256, "Most media items of one request.")
    num_media_workers: int | None = option(
        None,
        "Processes that decode and preprocess, for each modality; one per core, at most 8, when not given.",
    )
    media_worker_memory_gb: float = option(
        4.0,
        "GiB of memory that one of these processes may use for an item; addresses that it only reserves do not count.",
    )
    media_decode_timeout: float = option(
        60.0, "Seconds that decoding and preprocessing of one item may take."
    )

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("image_fetch_timeout", "video_fetch_timeout", "audio_fetch_timeout"):
            check_number(name, getattr(self, name), 0.001, 3600.0)
        check_integer("max_media_redirects", self.max_media_redirects, 0, 100)
        check_integer("media_fetch_retries", self.media_fetch_retries, 0, 100)
        check_number("media_url_reuse_seconds", self.media_url_reuse_seconds, 0.0, 3600.0)
        check_integer("media_url_reuse_bytes", self.media_url_reuse_bytes, 0, 1 << 50)
        check_number("media_download_cache_gb", self.media_download_cache_gb, 0.001, 1 << 20)
        for name in (
            "max_media_connections",
            "max_media_connections_per_host",
            "max_media_fetches_per_request",
            "max_media_bytes_in_flight",
            "max_media_bytes",
            "max_request_media_bytes",
            "max_image_pixels",
            "max_video_frames",
            "max_video_pixels",
            "max_audio_seconds",
            "max_audio_decoded_bytes",
            "max_items_per_request",
        ):
            check_integer(name, getattr(self, name), 1, 1 << 50)
        check_number("media_worker_memory_gb", self.media_worker_memory_gb, 0.0625, 1024.0)
        check_number("media_decode_timeout", self.media_decode_timeout, 0.001, 86400.0)
        if self.num_media_workers is not None:
            check_integer("num_media_workers", self.num_media_workers, 1, 256)
        check_limits("limit_mm_per_prompt", self.limit_mm_per_prompt)
        for name in ("mm_processor_kwargs", "media_io_kwargs"):
            if not isinstance(getattr(self, name), dict):
                bad(name, f"must be a mapping, got {getattr(self, name)!r}")

    def fetch_timeout(self, modality: str) -> float:
        """Seconds that the download of an item of this modality may take."""
        return float(getattr(self, f"{modality}_fetch_timeout"))

    def limit(self, modality: str) -> int | None:
        """Most items of a modality in one prompt; None when there is no limit of its own."""
        value = self.limit_mm_per_prompt.get(modality)
        return value.get("count") if isinstance(value, dict) else value

    def max_sampled_frames(self) -> int | None:
        """Most frames that are sampled of one video; None when ``limit_mm_per_prompt`` sets no limit."""
        value = self.limit_mm_per_prompt.get("video")
        return value.get("num_frames") if isinstance(value, dict) else None


def parse_limits(text: str) -> dict[str, Any]:
    """``image=2,video=1`` (older) or a JSON object, for ``--limit-mm-per-prompt``."""
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError as error:
            bad("limit_mm_per_prompt", f"is not valid JSON: {error}")
        return dict(value)
    limits: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, count = part.partition("=")
        if not equals or not count.strip().isdecimal():
            bad("limit_mm_per_prompt", f"must look like image=2,video=1 or be JSON, got {text!r}")
        limits[name.strip()] = int(count)
    return limits


def check_limits(name: str, value: object) -> None:
    if not isinstance(value, dict):
        bad(name, f"must be a mapping such as {{'image': 2}}, got {value!r}")
    for modality, limit in value.items():
        check_choice(name, modality, LIMITED)
        if isinstance(limit, dict):
            for key, number in limit.items():
                check_choice(
                    f"{name}[{modality!r}]",
                    key,
                    ("count", "num_frames", "width", "height", "length"),
                )
                least = 1 if key == "num_frames" else 0
                check_integer(f"{name}[{modality!r}][{key!r}]", number, least, 1 << 31)
        else:
            check_integer(f"{name}[{modality!r}]", limit, 0, 1 << 31)
