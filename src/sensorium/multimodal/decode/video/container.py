"""Containers of encoded videos.

Their format, their packets, an index of their frames, and a decoder for them.

Indexing decodes nothing: it notes the timestamp of each packet and whether one can begin there,
which gives the true number of frames and their order, whatever the header says, and makes every
container one that can be entered at any key packet, with or without an index of its own.
"""

from __future__ import annotations

import io
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sensorium.errors import MediaTooLargeError, MediaUndecodableError, OverloadedError
from sensorium.multimodal.decode.shortage import NO_THREADS, check_shortage, decoder_threads
from sensorium.multimodal.decode.video.frame_sampling import MAX_FPS
from sensorium.multimodal.decode.video.limits import Limits, check_pixels

if TYPE_CHECKING:
    import av
    import av.container

FORMATS = (
    *("MP4", "MOV", "WebM", "MKV", "AVI", "GIF", "MPEG-TS", "MPEG-PS", "FLV", "WMV", "OGV"),
    *("animated WebP", "animated PNG"),
)
CODECS = frozenset(
    "av1 ffv1 flv1 gif h263 h264 hevc mjpeg mpeg1video mpeg2video mpeg4 msmpeg4v3 png prores "
    "rawvideo theora vc1 vp6 vp6f vp8 vp9 wmv1 wmv2 wmv3".split()
)
"""Codecs that are decoded, of the hundreds that FFmpeg knows."""

MAX_PACKETS = 1 << 20
"""Nine hours at 30 frames per second; more are refused while a container is indexed."""
MAX_ENTRIES = 32
"""Key packets that are tried for a frame, from the last one on: usually the first or second will
do."""
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_TS_PACKETS = ((0, 188), (4, 192), (0, 204))
"""Start of the first packet of an MPEG transport stream, with ``G``, and length of each."""


def format_of(data: bytes) -> str:
    """Return FFmpeg's name of the container, by its first bytes.

    FFmpeg's own guess would also allow playlists, which name other files. Raises
    MediaUndecodableError.
    """
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mov"
    if data[:4] == b"FLV\x01":
        return "flv"
    if data[:4] == b"OggS":
        return "ogg"
    if data[:4] == b"\x00\x00\x01\xba":
        return "mpeg"
    if data[:16] == _ASF:
        return "asf"
    if any(data[at : at + 2 * size + 1 : size] == b"GGG" for at, size in _TS_PACKETS):
        return "mpegts"
    raise MediaUndecodableError(
        f"The bytes are not a video in a known format ({', '.join(FORMATS)})."
        if data
        else "The video is empty: 0 bytes."
    )


@contextmanager
def opened(
    data: bytes, form: str, limits: Limits
) -> Iterator[tuple[av.container.InputContainer, Any]]:
    """Open a container; give it and its video stream.

    Raises MediaUndecodableError for an unknown codec.
    """
    import av
    from av.stream import Disposition

    options = {"protocol_whitelist": "", "format_whitelist": form}
    with av.open(
        io.BytesIO(data),
        "r",
        format=form,
        options=limits.for_decoder(),  # opening decodes a little, to know the format of the pixels
        container_options=options,
        metadata_errors="ignore",
    ) as container:
        stream: Any = container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise MediaUndecodableError("The file has no video track.")
        codec = stream.codec_context and stream.codec_context.codec.canonical_name
        if codec not in CODECS:
            raise MediaUndecodableError(
                "The video track is of a codec that is not decoded; known are "
                f"{', '.join(sorted(CODECS))}."
            )
        yield container, stream


def packets_of(container: av.container.InputContainer, stream: Any) -> Iterator[av.Packet[Any]]:
    """Yield the packets of the stream until the file ends or cannot be read further.

    Raises MemoryError.
    """
    import av.error

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError as error:
            check_shortage(error)
            return
        if packet is None:
            return
        if packet.size:
            yield packet


@dataclass(frozen=True, slots=True)
class FrameIndex:
    """Frames of a container, as their packets tell.

    ``pts`` and ``packets``: timestamp and packet number of each frame, in the order of the frames;
    ``pts`` is empty where timestamps cannot be used. ``keys``: packets at which decoding can begin,
    ascending, with their timestamps.
    """

    form: str
    num_packets: int
    packets: list[int]
    pts: list[int]
    keys: list[tuple[int, int]]
    fps: float | None

    @property
    def num_frames(self) -> int:
        """Number of frames that are shown."""
        return len(self.packets)

    @property
    def timed(self) -> bool:
        """True if frames can be told apart by their timestamps."""
        return bool(self.pts)


def index_frames(data: bytes, form: str, limits: Limits) -> FrameIndex:
    """Return the index of a container without decoding it.

    Raises MediaTooLargeError, MediaUndecodableError.
    """
    with opened(data, form, limits) as (container, stream):
        hides = stream.codec_context.codec.canonical_name == "vp8"
        shown: list[tuple[int | None, int]] = []
        keys: list[tuple[int, int]] = []
        number = -1
        for number, packet in enumerate(packets_of(container, stream)):
            if number == MAX_PACKETS:
                raise MediaTooLargeError(f"The video has more than {MAX_PACKETS} frames; cut it.")
            # A GIF's frames lie over those before them, whatever their flags say.
            if packet.is_keyframe and packet.pts is not None and (form != "gif" or not number):
                keys.append((number, packet.pts))
            if not packet.is_discard and not (hides and _is_hidden(packet)):
                shown.append((packet.pts, number))
        if not shown:
            raise damaged()
        timed = [(pts, at) for pts, at in shown if pts is not None]
        usable = len({pts for pts, _ in timed}) == len(shown)
        may_lie = stream.codec_context.has_b_frames and timed == sorted(timed)
        if usable and may_lie:
            usable = _comes_in_order(data, form, limits)
        if not usable:
            fps = _plausible(stream.average_rate)
            return FrameIndex(form, number + 1, [at for _, at in shown], [], [], fps)
        timed.sort()
        pts = [stamp for stamp, _ in timed]
        fps = _rate(pts, float(stream.time_base), stream.average_rate)
        return FrameIndex(form, number + 1, [at for _, at in timed], pts, keys, fps)


def _is_hidden(packet: av.Packet[Any]) -> bool:
    """Return True for a VP8 packet that is never shown (RFC 6386, 9.1: ``show_frame``)."""
    return not bytes(memoryview(packet)[:1])[0] & 0x10


def _comes_in_order(data: bytes, form: str, limits: Limits) -> bool:
    """Return True if timestamps ascend as frames come out of the decoder.

    Some containers number the packets instead, of streams that store frames out of order.
    """
    with opened(data, form, limits) as (container, stream):
        start_decoder(stream.codec_context, 1, limits)
        head = itertools.islice(packets_of(container, stream), 48)
        stamps = [f.pts for packet in head for f in frames_of(stream.codec_context, packet)]
        known = [stamp for stamp in stamps if stamp is not None]
        return stamps == sorted(known)


def _rate(pts: Sequence[int], time_base: float, declared: Any) -> float | None:
    """Return the average frames per second.

    The declared rate where it is near the measured one, else the latter.
    """
    span = (pts[-1] - pts[0]) * time_base
    told = _plausible(declared)
    if len(pts) < 2:
        return told
    measured = _plausible((len(pts) - 1) / span)
    if measured is None or (told is not None and abs(told / measured - 1) < 0.02):
        return told
    return measured


def _plausible(rate: Any) -> float | None:
    if not rate or not math.isfinite(rate) or not 0 < rate <= MAX_FPS:
        return None
    return float(rate)


def damaged() -> MediaUndecodableError:
    """Return the error for a video that cannot be decoded."""
    return MediaUndecodableError("The video is damaged or truncated and cannot be decoded.")


def frames_of(context: Any, packet: av.Packet[Any] | None) -> list[av.VideoFrame]:
    """Decode a packet and return the frames that come out.

    None flushes the decoder, a damaged packet gives none.

    Raises MemoryError.
    """
    import av.error

    try:
        return list(context.decode(packet))
    except av.error.FFmpegError as error:
        check_shortage(error)
        return []


def start_decoder(context: Any, num_frames: int, limits: Limits) -> None:
    """Check what the header promises, and start the decoder.

    Raises OverloadedError when it gets no threads.
    """
    check_pixels(num_frames, context.height, context.width, limits)
    context.thread_type = "AUTO"
    context.thread_count = decoder_threads()
    context.options = limits.for_decoder()
    try:
        context.open(strict=False)
    except (BlockingIOError, MemoryError):  # the decoder got no thread, or no stack for one
        raise OverloadedError(NO_THREADS) from None


def packet_ranges(index: FrameIndex, wanted: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ranges of packets (first, last) to decode for the wanted frames, ascending."""
    needed = sorted((_entry(index, i), index.packets[i]) for i in wanted)
    runs: list[tuple[int, int]] = []
    for start, end in needed:
        if runs and start <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], max(runs[-1][1], end))
        else:
            runs.append((start, end))
    return runs


def _entry(index: FrameIndex, frame: int) -> int:
    """Return the packet at which to begin for a frame.

    The last key packet neither stored nor shown after it.

    A frame that is stored after a key packet and shown before it may need those before the key
    packet.
    """
    stored_before = bisect_right(index.keys, index.packets[frame], key=lambda key: key[0])
    for place in range(stored_before - 1, max(stored_before - 1 - MAX_ENTRIES, -1), -1):
        number, pts = index.keys[place]
        if pts <= index.pts[frame]:
            return number
    return 0
