"""Frames out of encoded videos, through FFmpeg's libraries (PyAV); only what the wanted frames need is decoded.

A container is read twice. The first reading decodes nothing: it notes the timestamp of each packet and whether one can
begin there, which gives the true number of frames and their order, whatever the header says, and makes every container
one that can be entered at any key packet, with or without an index of its own. The second reading decodes, for each
wanted frame, from the nearest key packet before it, and stops after the last. Seven packets in the order of the file,
with the frames that they show (a frame may need a later one, and is then stored after it):

    packet   0K  1   2   3   4K  5   6
    frame    0   2   1   3   4   6   5        frames 1 and 5 wanted: packets 0 to 2 and 4 to 6 are decoded

Where timestamps are missing, doubled or out of order, frames are counted as they come out, from the first to the last.
Nothing that FFmpeg says reaches a message.
"""

from __future__ import annotations

import io
import itertools
import math
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sensorium.errors import (
    MediaTooLargeError,
    MediaUndecodableError,
    OverloadedError,
    RequestError,
)
from sensorium.multimodal.decode.mp4_bounds import check_boxes
from sensorium.multimodal.decode.shortage import NO_THREADS, check_shortage, decoder_threads
from sensorium.multimodal.decode.video.frame_sampling import MAX_FPS
from sensorium.multimodal.decode.video.orientation import Converter
from sensorium.multimodal.items import Video
from sensorium.multimodal.processor import VideoFacts

if TYPE_CHECKING:
    import av
    import av.container

FORMATS = (
    *("MP4", "MOV", "WebM", "MKV", "AVI", "GIF", "MPEG-TS", "MPEG-PS", "FLV", "WMV", "OGV"),
    *("animated WebP", "animated PNG"),
)
CODECS = frozenset(
    "av1 ffv1 flv1 gif h263 h264 hevc mjpeg mpeg1video mpeg2video mpeg4 msmpeg4v3 png prores rawvideo theora vc1 vp6 "
    "vp6f vp8 vp9 wmv1 wmv2 wmv3".split()
)
"""What is decoded, of the hundreds that FFmpeg knows."""

MAX_PACKETS = 1 << 20
"""Nine hours at 30 frames per second; more are refused while a container is indexed."""
MAX_ENTRIES = 32
"""Key packets that are tried for a frame, from the last one on: usually the first or second will do."""
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_TS_PACKETS = ((0, 188), (4, 192), (0, 204))
"""Where the first packet of an MPEG transport stream begins, with ``G``, and how long each is."""
_GIF_SIZE = struct.Struct("<6xHH")
FULL_HD = 1920 * 1088
"""Pixels of a frame that counts as one against the limit on decoded frames; larger ones count as several."""

Sample = Callable[[VideoFacts], np.ndarray]


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_frames``: that are decoded, at most ``FULL_HD`` each, or fewer larger ones. ``max_pixels``: of all sampled
    frames together. ``max_frame_pixels``: of each frame."""

    max_frames: int
    max_pixels: int
    max_frame_pixels: int

    def for_decoder(self) -> dict[str, str]:
        """FFmpeg's option, so that nothing much larger is allocated, whatever the header or a later frame says.

        It counts columns that it adds to make rows of whole vectors, too.
        """
        most = 2 * min(self.max_pixels, self.max_frame_pixels) + (1 << 20)
        return {"max_pixels": str(min(most, (1 << 31) - 1))}


def decode(data: bytes, sample: Sample, limits: Limits) -> Video:
    """The sampled frames of an encoded video, upright.

    Raises MediaUndecodableError when the bytes are no video of one of ``FORMATS`` and ``CODECS`` or nothing can be
    decoded, and MediaTooLargeError, which names the flag, before more than the limits is done.
    """
    form = _form(data)
    if form == "mov":
        check_boxes(data)
    if form == "gif" and len(data) >= _GIF_SIZE.size:  # FFmpeg tells it with the first frame only
        width, height = _GIF_SIZE.unpack_from(data)
        check_pixels(1, height, width, limits)
    try:
        index = _index(data, form, limits)
        facts = VideoFacts(index.num_frames, index.fps)
        clip = _decode_wanted(data, index, facts, sample(facts), limits) if index.timed else None
        clip = clip or _decode_in_order(data, index, sample, limits)
    except (RequestError, OverloadedError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything for damaged files
        check_shortage(error)
        raise _damaged() from None
    if clip is None:
        raise _damaged()
    return clip


def _form(data: bytes) -> str:
    """FFmpeg's name of the container, by its first bytes: FFmpeg's own guess would also take play lists, which name
    other files."""
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


# --- reading a container ---------------------------------------------------------------------------------------------


@contextmanager
def _opened(
    data: bytes, form: str, limits: Limits
) -> Iterator[tuple[av.container.InputContainer, Any]]:
    """The container and its video stream."""
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


def _packets(container: av.container.InputContainer, stream: Any) -> Iterator[av.Packet[Any]]:
    """The packets of the stream up to where the file ends or is damaged beyond reading. Raises MemoryError."""
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
class _Index:
    """What the first reading finds.

    ``pts`` and ``packets``: timestamp and packet number of each frame, in the order of the frames; ``pts`` is empty
    where timestamps cannot be used. ``keys``: packets at which decoding can begin, ascending, with their timestamps.
    """

    form: str
    num_packets: int
    packets: list[int]
    pts: list[int]
    keys: list[tuple[int, int]]
    fps: float | None

    @property
    def num_frames(self) -> int:
        return len(self.packets)

    @property
    def timed(self) -> bool:
        return bool(self.pts)


def _index(data: bytes, form: str, limits: Limits) -> _Index:
    with _opened(data, form, limits) as (container, stream):
        hides = stream.codec_context.codec.canonical_name == "vp8"
        shown: list[tuple[int | None, int]] = []
        keys: list[tuple[int, int]] = []
        number = -1
        for number, packet in enumerate(_packets(container, stream)):
            if number == MAX_PACKETS:
                raise MediaTooLargeError(f"The video has more than {MAX_PACKETS} frames; cut it.")
            # A GIF's frames lie over those before them, whatever their flags say.
            if packet.is_keyframe and packet.pts is not None and (form != "gif" or not number):
                keys.append((number, packet.pts))
            if not packet.is_discard and not (hides and _is_hidden(packet)):
                shown.append((packet.pts, number))
        if not shown:
            raise _damaged()
        timed = [(pts, at) for pts, at in shown if pts is not None]
        usable = len({pts for pts, _ in timed}) == len(shown)
        may_lie = stream.codec_context.has_b_frames and timed == sorted(timed)
        if usable and may_lie:
            usable = _comes_in_order(data, form, limits)
        if not usable:
            fps = _plausible(stream.average_rate)
            return _Index(form, number + 1, [at for _, at in shown], [], [], fps)
        timed.sort()
        pts = [stamp for stamp, _ in timed]
        fps = _rate(pts, float(stream.time_base), stream.average_rate)
        return _Index(form, number + 1, [at for _, at in timed], pts, keys, fps)


def _is_hidden(packet: av.Packet[Any]) -> bool:
    """Whether a VP8 packet only makes a reference for others (RFC 6386, 9.1: the bit ``show_frame``)."""
    return not bytes(memoryview(packet)[:1])[0] & 0x10


def _comes_in_order(data: bytes, form: str, limits: Limits) -> bool:
    """Whether timestamps ascend as frames come out; some containers number the packets instead, of streams that store
    frames out of order."""
    with _opened(data, form, limits) as (container, stream):
        _prepare(stream.codec_context, 1, limits)
        head = itertools.islice(_packets(container, stream), 48)
        stamps = [f.pts for packet in head for f in _frames(stream.codec_context, packet)]
        known = [stamp for stamp in stamps if stamp is not None]
        return stamps == sorted(known)


def _rate(pts: Sequence[int], time_base: float, declared: Any) -> float | None:
    """Frames per second on average: what the file declares where that is near what is measured, else the latter."""
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


def _damaged() -> MediaUndecodableError:
    return MediaUndecodableError("The video is damaged or truncated and cannot be decoded.")


# --- decoding --------------------------------------------------------------------------------------------------------


def _frames(context: Any, packet: av.Packet[Any] | None) -> list[av.VideoFrame]:
    """What comes out when a packet goes in (or, for None, what is still inside); nothing for a damaged one.
    Raises MemoryError."""
    import av.error

    try:
        return list(context.decode(packet))
    except av.error.FFmpegError as error:
        check_shortage(error)
        return []


def _prepare(context: Any, num_frames: int, limits: Limits) -> None:
    """Check what the header promises, and start the decoder. Raises OverloadedError when it gets no threads."""
    check_pixels(num_frames, context.height, context.width, limits)
    context.thread_type = "AUTO"
    context.thread_count = decoder_threads()
    context.options = limits.for_decoder()
    try:
        context.open(strict=False)
    except (
        BlockingIOError,
        MemoryError,
    ):  # how decoders say that they got no thread, or no stack for one
        raise OverloadedError(NO_THREADS) from None


def _decode_wanted(
    data: bytes, index: _Index, facts: VideoFacts, indices: np.ndarray, limits: Limits
) -> Video | None:
    """Decode the stretches of packets that the wanted frames need; None when these do not come."""
    wanted = sorted({int(i) for i in indices})
    check_work(len(wanted), 0, limits)
    stretches = _stretches(index, wanted)
    num_decoded = sum(end + 1 - start for start, end in stretches)
    at = {index.packets[i] for i in wanted}
    numbers = {index.pts[i]: i for i in wanted}
    with _opened(data, index.form, limits) as (container, stream):
        context = stream.codec_context
        check_work(num_decoded, context.height * context.width, limits)
        _prepare(context, len(indices), limits)
        pictures, work = _Pictures(indices, limits), _Work(limits)
        packets = enumerate(_packets(container, stream))
        for start, end in stretches:
            for number, packet in packets:
                if number < start:
                    continue
                # What no other frame needs and nobody wants is left out.
                context.skip_frame = "DEFAULT" if number in at else "NONREF"
                for frame in _frames(context, packet):
                    work.add(frame)
                    pictures.offer(_number(frame, numbers), frame)
                if number == end:
                    break
            for frame in _frames(context, None):
                pictures.offer(_number(frame, numbers), frame)
            context.flush_buffers()
        return pictures.clip(facts)


def _number(frame: av.VideoFrame, numbers: Mapping[int, int]) -> int | None:
    return None if frame.pts is None else numbers.get(frame.pts)


def _stretches(index: _Index, wanted: Sequence[int]) -> list[tuple[int, int]]:
    """First and last packet of each run that must be decoded for the wanted frames, in order, apart."""
    needed = sorted((_entry(index, i), index.packets[i]) for i in wanted)
    runs: list[tuple[int, int]] = []
    for start, end in needed:
        if runs and start <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], max(runs[-1][1], end))
        else:
            runs.append((start, end))
    return runs


def _entry(index: _Index, frame: int) -> int:
    """The packet at which to begin for a frame: the last key packet that is neither stored nor shown after it.

    A frame that is stored after a key packet and shown before it may need those before the key packet.
    """
    stored_before = bisect_right(index.keys, index.packets[frame], key=lambda key: key[0])
    for place in range(stored_before - 1, max(stored_before - 1 - MAX_ENTRIES, -1), -1):
        number, pts = index.keys[place]
        if pts <= index.pts[frame]:
            return number
    return 0


def _decode_in_order(data: bytes, index: _Index, sample: Sample, limits: Limits) -> Video | None:
    """Decode everything and count; once more when there turn out to be more or fewer frames than packets. None when
    hardly any come."""
    facts = VideoFacts(index.num_frames, index.fps)
    for _ in range(2):
        indices = sample(facts)
        with _opened(data, index.form, limits) as (container, stream):
            context = stream.codec_context
            check_work(index.num_packets, context.height * context.width, limits)
            _prepare(context, len(indices), limits)
            pictures, work, num = _Pictures(indices, limits), _Work(limits), 0
            for packet in itertools.chain(_packets(container, stream), (None,)):
                for frame in _frames(context, packet):
                    pictures.offer(num, frame)
                    num += 1
                    work.add(frame)
        if num in (0, facts.num_frames):
            break
        facts = VideoFacts(num, facts.fps)
    return pictures.clip(facts)


def check_work(num_frames: int, num_pixels: int, limits: Limits) -> None:
    """Raise MediaTooLargeError for more frames, of so many pixels each, than may be decoded."""
    most = int(limits.max_frames * min(1.0, FULL_HD / max(num_pixels, 1)))
    if num_frames > most:
        size = " of this size" if most < limits.max_frames else ""
        raise MediaTooLargeError(
            f"{num_frames} frames of the video must be decoded to get at those that are wanted; at most "
            f"{most}{size} are allowed (--max-video-frames). Send a shorter video, or one with more key frames."
        )


class _Work:
    """Counts what comes out of a decoder: frames may be more, and larger, than the header says."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._num_frames = 0
        self._num_pixels = 0

    def add(self, frame: av.VideoFrame) -> None:
        """Count a frame. Raises MediaTooLargeError when they are too many."""
        self._num_frames += 1
        self._num_pixels += max(frame.height * frame.width, FULL_HD)
        check_work(self._num_frames, self._num_pixels // self._num_frames, self._limits)


def check_pixels(num_frames: int, height: int, width: int, limits: Limits) -> None:
    if height * width > limits.max_frame_pixels:
        raise MediaTooLargeError(
            f"A frame of the video has {width} x {height} pixels; at most {limits.max_frame_pixels} are allowed "
            "(--max-image-pixels). Send a smaller video."
        )
    if num_frames * height * width > limits.max_pixels:
        raise MediaTooLargeError(
            f"{num_frames} frames of {width} x {height} pixels are sampled of the video; at most {limits.max_pixels} "
            "pixels together are allowed (--max-video-pixels). Sample fewer frames or send a smaller video."
        )


class _Pictures:
    """Collects the wanted frames as they come out of a decoder, and stands in for those that never do."""

    def __init__(self, indices: np.ndarray, limits: Limits) -> None:
        self._indices = [int(i) for i in indices]
        self._wanted = sorted(set(self._indices))
        self._row_of = {number: row for row, number in enumerate(self._wanted)}
        self._limits = limits
        self._converter = Converter()
        self._size = (0, 0)
        self._rows = np.empty((0, 0, 0, 3), np.uint8)
        self._there: set[int] = set()

    def offer(self, number: int | None, frame: av.VideoFrame) -> None:
        """Keep the frame of this number if it is wanted."""
        row = None if number is None else self._row_of.get(number)
        if number is None or row is None:
            return
        if not self._there:
            check_pixels(len(self._indices), frame.height, frame.width, self._limits)
            self._size = (frame.width, frame.height)
        picture = self._converter.upright(frame, *self._size)
        if not self._there:
            self._rows = np.empty((len(self._wanted), *picture.shape), np.uint8)
        if picture.shape == self._rows.shape[1:]:
            self._rows[row] = picture
            self._there.add(number)

    def clip(self, facts: VideoFacts) -> Video | None:
        """All frames; for one that is missing, the nearest of those that are there. None when more than half are
        missing."""
        there = np.array(sorted(self._there), dtype=np.int64)
        if 2 * len(there) < len(self._wanted) or not len(there):
            return None
        taken = self._indices
        if len(there) < len(self._wanted):
            taken = [int(there[np.abs(there - i).argmin()]) for i in self._indices]
        frames = self._rows
        if taken != self._wanted:
            frames = frames[[self._row_of[i] for i in taken]]
        return Video(frames, tuple(taken), facts.num_frames, facts.fps)
