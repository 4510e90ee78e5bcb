"""Frames out of encoded videos, through FFmpeg's libraries (PyAV).

Only what the wanted frames need is decoded.

A container is read twice: once for an index of its frames (``container``), and once to decode, for
each wanted frame, from the nearest key packet before it; reading stops after the last. Seven
packets in the order of the file, with the frames that they show (a frame may need a later one, and
is then stored after it):

    packet   0K  1   2   3   4K  5   6
    frame    0   2   1   3   4   6   5        frames 1 and 5 wanted: packets 0 to 2 and 4 to 6 are decoded

Where timestamps are missing, doubled or out of order, frames are counted as they come out, from the
first to the last. Messages quote nothing that FFmpeg says.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from sensorium.errors import OverloadedError, RequestError
from sensorium.multimodal.decode.mp4_bounds import check_boxes
from sensorium.multimodal.decode.shortage import check_shortage
from sensorium.multimodal.decode.video import container as containers
from sensorium.multimodal.decode.video.container import FrameIndex
from sensorium.multimodal.decode.video.limits import (
    DecodedFrames,
    Limits,
    check_pixels,
    check_work,
)
from sensorium.multimodal.decode.video.orientation import Converter
from sensorium.multimodal.items import Video
from sensorium.multimodal.processor import VideoFacts

if TYPE_CHECKING:
    import av

_GIF_SIZE = struct.Struct("<6xHH")
Sample = Callable[[VideoFacts], np.ndarray]


def decode(data: bytes, sample: Sample, limits: Limits) -> Video:
    """Return the sampled frames of an encoded video, in display orientation.

    Raises MediaUndecodableError when the bytes are no video of one of ``FORMATS`` and ``CODECS`` or
    nothing can be decoded, and MediaTooLargeError, which names the flag, before more than the
    limits is done.
    """
    form = containers.format_of(data)
    if form == "mov":
        check_boxes(data)
    if form == "gif" and len(data) >= _GIF_SIZE.size:  # FFmpeg tells it with the first frame only
        width, height = _GIF_SIZE.unpack_from(data)
        check_pixels(1, height, width, limits)
    try:
        index = containers.index_frames(data, form, limits)
        facts = VideoFacts(index.num_frames, index.fps)
        video = _decode_wanted(data, index, facts, sample(facts), limits) if index.timed else None
        video = video or _decode_in_order(data, index, sample, limits)
    except (RequestError, OverloadedError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything for damaged files
        check_shortage(error)
        raise containers.damaged() from None
    if video is None:
        raise containers.damaged()
    return video


def _decode_wanted(
    data: bytes, index: FrameIndex, facts: VideoFacts, indices: np.ndarray, limits: Limits
) -> Video | None:
    """Decode the ranges of packets that the wanted frames need.

    Return None when too few frames come.
    """
    wanted = sorted({int(i) for i in indices})
    check_work(len(wanted), 0, limits)
    ranges = containers.packet_ranges(index, wanted)
    num_decoded = sum(end + 1 - start for start, end in ranges)
    at = {index.packets[i] for i in wanted}
    numbers = {index.pts[i]: i for i in wanted}
    with containers.opened(data, index.form, limits) as (container, stream):
        context = stream.codec_context
        check_work(num_decoded, context.height * context.width, limits)
        containers.start_decoder(context, len(indices), limits)
        found, work = _WantedFrames(indices, limits), DecodedFrames(limits)
        packets = enumerate(containers.packets_of(container, stream))
        for start, end in ranges:
            for number, packet in packets:
                if number < start:
                    continue
                # Frames that are neither wanted nor needed by others are skipped.
                context.skip_frame = "DEFAULT" if number in at else "NONREF"
                for frame in containers.frames_of(context, packet):
                    work.add(frame)
                    found.offer(_number(frame, numbers), frame)
                if number == end:
                    break
            for frame in containers.frames_of(context, None):
                found.offer(_number(frame, numbers), frame)
            context.flush_buffers()
        return found.video(facts)


def _number(frame: av.VideoFrame, numbers: Mapping[int, int]) -> int | None:
    return None if frame.pts is None else numbers.get(frame.pts)


def _decode_in_order(
    data: bytes, index: FrameIndex, sample: Sample, limits: Limits
) -> Video | None:
    """Decode everything and count; once more when there are more or fewer frames than packets.

    Returns None when hardly any come.
    """
    facts = VideoFacts(index.num_frames, index.fps)
    for _ in range(2):
        indices = sample(facts)
        with containers.opened(data, index.form, limits) as (container, stream):
            context = stream.codec_context
            check_work(index.num_packets, context.height * context.width, limits)
            containers.start_decoder(context, len(indices), limits)
            found, work, num = _WantedFrames(indices, limits), DecodedFrames(limits), 0
            for packet in itertools.chain(containers.packets_of(container, stream), (None,)):
                for frame in containers.frames_of(context, packet):
                    found.offer(num, frame)
                    num += 1
                    work.add(frame)
        if num in (0, facts.num_frames):
            break
        facts = VideoFacts(num, facts.fps)
    return found.video(facts)


class _WantedFrames:
    """Collector of the wanted frames; repeats neighbours for those that never come."""

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
        array = self._converter.oriented(frame, *self._size)
        if not self._there:
            self._rows = np.empty((len(self._wanted), *array.shape), np.uint8)
        if array.shape == self._rows.shape[1:]:
            self._rows[row] = array
            self._there.add(number)

    def video(self, facts: VideoFacts) -> Video | None:
        """Return all frames, with the nearest one in place of a missing one.

        None when more than half are missing.
        """
        there = np.array(sorted(self._there), dtype=np.int64)
        if 2 * len(there) < len(self._wanted) or not len(there):
            return None
        sources = self._indices
        if len(there) < len(self._wanted):
            sources = [int(there[np.abs(there - i).argmin()]) for i in self._indices]
        frames = self._rows
        if sources != self._wanted:
            frames = frames[[self._row_of[i] for i in sources]]
        return Video(frames, tuple(sources), facts.num_frames, facts.fps)
