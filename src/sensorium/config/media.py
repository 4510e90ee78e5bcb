"""Options of media: fetching, decoding, limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sensorium.bounds import Bounds
from sensorium.config.fields import MIB, bad, check_choice, check_fields, check_number, option

LIMITED = ("image", "video", "audio")
"""Keys of ``limit_mm_per_prompt``."""
_MOST = 1 << 50
"""Upper bound of counts and sizes that have no other."""


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """Fetching, decoding and limits of images, videos and audio."""

    limit_mm_per_prompt: dict[str, Any] = option(
        dict,
        'Maximum number of items per prompt, such as {"image": 2} or image=2; 0 disables a '
        "modality.",
        factory=True,
    )
    mm_processor_kwargs: dict[str, Any] = option(
        dict, 'Options of the model\'s processor, such as {"max_pixels": 1003520}.', factory=True
    )
    media_io_kwargs: dict[str, dict[str, Any]] = option(
        dict,
        "Options of decoding by modality, such as "
        '{"image": {"rgba_background_color": [255, 255, 255]}}.',
        factory=True,
    )
    enable_mm_embeds: bool = option(False, "Accept precomputed embeddings as input.")
    allowed_local_media_path: str = option(
        "", "Folder below which file: URLs and local paths may be read; none if empty."
    )
    allowed_media_domains: tuple[str, ...] = option(
        (), "Hosts that media may be fetched from; any public host if empty."
    )
    media_url_allow_redirects: bool = option(True, "Follow redirects of media URLs.")
    max_media_redirects: int = option(
        5, "Maximum number of redirects of one download.", ge=0, le=100
    )
    image_fetch_timeout: float = option(
        5.0, "Seconds for the whole download of an image.", ge=0.001, le=3600.0
    )
    video_fetch_timeout: float = option(
        30.0, "Seconds for the whole download of a video.", ge=0.001, le=3600.0
    )
    audio_fetch_timeout: float = option(
        10.0, "Seconds for the whole download of an audio file.", ge=0.001, le=3600.0
    )
    document_fetch_timeout: float = option(
        30.0,
        "Seconds for the whole download of a file whose content says what it is, such as a PDF.",
        ge=0.001,
        le=3600.0,
    )
    media_fetch_retries: int = option(
        3,
        "Number of retries of a download after a transient failure, within its timeout.",
        ge=0,
        le=100,
    )
    max_media_connections: int = option(
        128, "Maximum number of connections to media hosts; further downloads wait.", ge=1, le=_MOST
    )
    max_media_connections_per_host: int = option(
        32,
        "Maximum number of connections to one media host; further downloads wait.",
        ge=1,
        le=_MOST,
    )
    max_media_fetches_per_request: int = option(
        8,
        "Maximum number of concurrent downloads of one request; further ones wait.",
        ge=1,
        le=_MOST,
    )
    max_media_bytes_in_flight: int = option(
        2048 * MIB,
        "Maximum number of bytes of all downloads that are running or wait to be decoded; beyond "
        "it, 503; for a request with more than that alone, 413.",
        ge=1,
        le=_MOST,
    )
    media_url_reuse_seconds: float = option(
        1.0,
        "Seconds for which a finished download serves further requests for its URL, unless its "
        "host forbids storing it; 0: only requests that arrive while it runs.",
        ge=0.0,
        le=3600.0,
    )
    media_url_reuse_bytes: int = option(
        64 * MIB,
        "Maximum number of bytes of finished downloads kept for such requests.",
        ge=0,
        le=_MOST,
    )
    media_download_cache: str = option(
        "",
        "Folder that keeps downloads between requests and restarts, as far as their hosts allow; "
        "none if empty.",
    )
    media_download_cache_seconds: float = option(
        3600.0,
        "Seconds for which that folder keeps a download; fewer if the Cache-Control or Expires of "
        "its host says so.",
        ge=0.001,
        le=365 * 86400.0,
    )
    media_download_cache_gb: float = option(
        10.0,
        "Size of that folder in GiB; the least recently used downloads are evicted.",
        ge=0.001,
        le=1 << 20,
    )
    max_media_bytes: int = option(
        256 * MIB, "Maximum number of bytes of one download.", ge=1, le=_MOST
    )
    max_request_media_bytes: int = option(
        256 * MIB, "Maximum number of bytes of all media of one request.", ge=1, le=_MOST
    )
    max_image_pixels: int = option(
        178_956_970, "Maximum number of pixels of an image or a video frame.", ge=1, le=_MOST
    )
    max_video_frames: int = option(
        36_000,
        "Maximum number of frames of one video that are decoded to reach the sampled ones; frames "
        "larger than 1920 x 1088 count as several.",
        ge=1,
        le=_MOST,
    )
    max_video_pixels: int = option(
        536_870_912,
        "Maximum number of pixels of all sampled frames of one video.",
        ge=1,
        le=_MOST,
    )
    max_audio_seconds: int = option(600, "Maximum duration of one audio item.", ge=1, le=_MOST)
    max_audio_decoded_bytes: int = option(
        256 * MIB,
        "Maximum number of bytes of one decoded audio item, all channels together.",
        ge=1,
        le=_MOST,
    )
    max_document_bytes: int = option(
        64 * MIB, "Maximum number of bytes of one PDF.", ge=1, le=_MOST
    )
    max_document_pages: int = option(
        100, "Maximum number of pages of one PDF; each becomes an image.", ge=1, le=1 << 20
    )
    document_dpi: float = option(
        144.0, "Pixels per inch at which pages of PDFs are drawn.", ge=9.0, le=1200.0
    )
    max_document_page_pixels: int = option(
        4_194_304,
        "Maximum number of pixels of one page of a PDF; larger pages are drawn at fewer pixels per "
        "inch.",
        ge=1,
        le=_MOST,
    )
    max_document_pixels: int = option(
        268_435_456, "Maximum number of pixels of all pages of one PDF.", ge=1, le=_MOST
    )
    max_document_page_chars: int = option(
        8192,
        "Maximum number of characters of a page's text that go into the prompt after its image; 0 "
        "for images alone.",
        ge=0,
        le=1 << 20,
    )
    document_timeout: float = option(
        120.0,
        "Seconds for reading the pages of one PDF, and for drawing them all; drawing a page also "
        "has --media-decode-timeout.",
        ge=0.001,
        le=86400.0,
    )
    max_items_per_request: int = option(
        256, "Maximum number of media items of one request.", ge=1, le=_MOST
    )
    num_media_workers: int | None = option(
        None,
        "Number of processes that decode and preprocess, per modality; one per core and at most 8 "
        "if unset.",
        ge=1,
        le=256,
    )
    media_worker_memory_gb: float = option(
        4.0,
        "GiB of memory that one of these processes may use for an item; address space that is only "
        "reserved does not count.",
        ge=0.0625,
        le=1024.0,
    )
    media_decode_timeout: float = option(
        60.0, "Seconds for decoding and preprocessing one item.", ge=0.001, le=86400.0
    )

    def __post_init__(self) -> None:
        """Check the values. Raises ConfigError."""
        check_fields(self)
        check_limits("limit_mm_per_prompt", self.limit_mm_per_prompt)

    def fetch_timeout(self, modality: str) -> float:
        """Return the seconds for the download of an item of a modality."""
        return float(getattr(self, f"{modality}_fetch_timeout"))

    def limit(self, modality: str) -> int | None:
        """Return the maximum number of items of a modality in one prompt, None without limit."""
        value = self.limit_mm_per_prompt.get(modality)
        return value.get("count") if isinstance(value, dict) else value

    def max_sampled_frames(self) -> int | None:
        """Return the maximum number of frames sampled from one video, None without limit."""
        value = self.limit_mm_per_prompt.get("video")
        return value.get("num_frames") if isinstance(value, dict) else None


def parse_limits(text: str) -> dict[str, Any]:
    """Parse ``--limit-mm-per-prompt``: a JSON object, or ``image=2,video=1`` (deprecated).

    Raises:
        ConfigError: the text is neither.
    """
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


def check_limits(name: str, value: dict[Any, Any]) -> None:
    """Check a value of ``limit_mm_per_prompt``. Raises ConfigError."""
    for modality, limit in value.items():
        check_choice(name, modality, LIMITED)
        place = f"{name}[{modality!r}]"
        if isinstance(limit, dict):
            for key, number in limit.items():
                check_choice(place, key, ("count", "num_frames", "width", "height", "length"))
                least = 1 if key == "num_frames" else 0
                check_number(f"{place}[{key!r}]", number, Bounds(ge=least, le=1 << 31))
        else:
            check_number(place, limit, Bounds(ge=0, le=1 << 31))
