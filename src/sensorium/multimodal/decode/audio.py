"""Audio: files, arrays, tensors and lists to mono samples at the model's rate.

Files that libsndfile knows (WAV, FLAC, OGG, MP3, AIFF …) are read through it, all others (M4A,
WebM, the sound of a video) through FFmpeg's libraries. Length and size are read from the header
before anything is decoded, and counted again while decoding: headers may lie. Channels are averaged
block by block, so that a clip of many channels needs the memory of one (but for MP3). Nothing that
the libraries say reaches a message: their texts may hold addresses.
"""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from sensorium.config import MediaConfig
from sensorium.errors import (
    InvalidRequestError,
    MediaTooLargeError,
    MediaUndecodableError,
    RequestError,
)
from sensorium.multimodal.decode.mp4_bounds import check_boxes
from sensorium.multimodal.decode.options import check_names
from sensorium.multimodal.decode.shortage import check_shortage
from sensorium.multimodal.items import Audio, is_tensor

CONTAINERS = (
    *("mov", "matroska", "webm", "ogg", "avi", "flv", "asf", "mpegts", "mpeg", "aac", "ac3"),
    *("amr", "caf", "aiff", "wav", "mp3", "flac", "ape", "wv"),
)
"""Formats that FFmpeg's libraries may read. Playlists, which name other files and hosts, are
none of them."""
BLOCK_FRAMES = 65536
FULL_SCALE = {np.dtype(np.int16): 32768.0, np.dtype(np.int32): 2147483648.0}
MOST_RATE = 768_000
"""Samples per second. Resampling takes the longer the further two rates are apart."""
_SAMPLE_BYTES = 4  # decoded samples are float32
_LONGEST = 1 << 60  # a header that promises more knows nothing


@dataclass(frozen=True, slots=True)
class AudioOptions:
    """``media_io_kwargs["audio"]``: there is nothing to choose so far."""

    @classmethod
    def parse(
        cls, options: Mapping[str, Any], param: str = "media_io_kwargs.audio"
    ) -> AudioOptions:
        """Check and build. Raises InvalidRequestError for any key."""
        check_names(options, (), param, "sounds have none")
        return cls()


def decode(data: bytes, options: AudioOptions, config: MediaConfig, rate: int) -> Audio:
    """Return the first audio track of an encoded file at ``rate`` samples per second.

    Raises MediaTooLargeError for more than ``config.max_audio_seconds`` or
    ``config.max_audio_decoded_bytes``, and MediaUndecodableError when the bytes hold no sound in a
    known format, are damaged, empty or not finite.
    """
    if not data:
        raise MediaUndecodableError("The sound is empty: 0 bytes.")
    mixer = _Mixer(config)
    try:
        if not _read_with_libsndfile(data, mixer):
            _read_with_ffmpeg(data, mixer)
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly anything for damaged files
        check_shortage(error)
        raise MediaUndecodableError(
            "The sound is damaged or truncated and cannot be decoded."
        ) from None
    samples = mixer.samples()
    if not np.isfinite(samples).all():
        raise MediaUndecodableError("The sound has samples that are NaN or infinite.")
    if not samples.size:
        raise MediaUndecodableError("The sound is empty: it has no samples.")
    return _at_rate(samples, mixer.rate, rate)


def decode_object(source: Any, options: AudioOptions, config: MediaConfig, rate: int) -> Audio:
    """The sound of a pair of samples and their rate, at ``rate`` samples per second.

    Samples are a numpy array, a torch tensor or a list. Floats are taken as they are (full scale is
    -1 to 1), int16, int32 and uint8 (128 is silence) are scaled to that. Of two dimensions the
    shorter one is the channels, so that both (channels, n) and (n, channels) work; where both are
    equal it is the first. Channels are averaged.

    Raises InvalidRequestError for other types and shapes, for empty sounds and for NaN or infinite
    samples; MediaTooLargeError as ``decode``.
    """
    values, source_rate = source
    array = read_samples(values)
    if array.ndim not in (1, 2):
        raise InvalidRequestError(
            "The samples of a sound must have 1 dimension, or 2 with channels, got shape "
            f"{array.shape}."
        )
    if not array.size:
        raise InvalidRequestError(f"The sound is empty: its shape is {array.shape}.")
    if array.ndim == 2 and array.shape[0] <= array.shape[1]:
        array = array.T
    channels = array.shape[1] if array.ndim == 2 else 1
    _check_length(len(array), channels, int(source_rate), config)
    samples = _scaled(array)
    if samples.ndim == 2:
        samples = _mixed(samples)
    if not np.isfinite(samples).all():
        raise InvalidRequestError("The sound has samples that are NaN or infinite in float32.")
    return _at_rate(samples, int(source_rate), rate)


class _Mixer:
    """Collects decoded blocks as one channel, within the limits.

    ``rate`` is set by the first block.
    """

    def __init__(self, config: MediaConfig) -> None:
        self.rate = 0
        self._config = config
        self._blocks: list[np.ndarray] = []
        self._num_frames = 0

    def promise(self, num_frames: int, num_channels: int, rate: int) -> None:
        """Check what a header says."""
        if not 1 <= rate <= MOST_RATE or num_channels < 1:
            raise MediaUndecodableError(
                f"The sound has {num_channels} channels of {rate} samples per second; there must "
                f"be a channel, and 1 to {MOST_RATE} samples."
            )
        if 0 < num_frames < _LONGEST:
            _check_length(num_frames, num_channels, rate, self._config)

    def add(self, block: np.ndarray, rate: int) -> None:
        """Take float32 samples (n, channels)."""
        if self.rate and rate != self.rate:
            raise MediaUndecodableError("The sound changes its sampling rate.")
        self.rate = rate
        self._num_frames += len(block)
        _check_length(self._num_frames, block.shape[1], rate, self._config)
        # A copy also of a single channel: decoders use their memory again.
        self._blocks.append(_mixed(block))

    def samples(self) -> np.ndarray:
        """(N,) float32."""
        return np.concatenate(self._blocks) if self._blocks else np.empty(0, np.float32)


def _check_length(num_frames: int, num_channels: int, rate: int, config: MediaConfig) -> None:
    if num_frames > config.max_audio_seconds * rate:
        raise MediaTooLargeError(
            f"The sound lasts {num_frames / rate:.2f} seconds or more; at most "
            f"{config.max_audio_seconds} are allowed (--max-audio-seconds)."
        )
    num_bytes = num_frames * num_channels * _SAMPLE_BYTES
    if num_bytes > config.max_audio_decoded_bytes:
        raise MediaTooLargeError(
            f"The sound has {num_bytes} bytes or more when it is decoded ({num_channels} channels, "
            f"{rate} samples per second); at most {config.max_audio_decoded_bytes} are allowed "
            "(--max-audio-decoded-bytes)."
        )


def _read_with_libsndfile(data: bytes, mixer: _Mixer) -> bool:
    """Decode into ``mixer``; False when libsndfile does not know the format."""
    import soundfile

    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.SoundFileError as error:
        check_shortage(error)
        return False
    with file:
        mixer.promise(file.frames, file.channels, file.samplerate)
        num_frames = BLOCK_FRAMES
        if file.subtype.startswith("MPEG"):
            # soundfile ends each read with a seek, behind which an MP3's decoder lacks the bits
            # that it had kept: such files are read at one go, which the promise bounds.
            if file.frames >= _LONGEST:
                return False
            num_frames = max(file.frames, 1)
        while len(block := file.read(num_frames, dtype="float32", always_2d=True)):
            mixer.add(block, file.samplerate)
    return True


def _read_with_ffmpeg(data: bytes, mixer: _Mixer) -> None:
    """Decode the first sound track into ``mixer``."""
    import av

    check_boxes(data)
    allowed = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": ""}
    try:
        container = av.open(io.BytesIO(data), mode="r", container_options=allowed)
    except (av.FFmpegError, ValueError) as error:
        check_shortage(error)
        raise MediaUndecodableError(
            "The bytes are not a sound in a known format (such as WAV, FLAC, OGG, MP3, M4A or "
            "WebM)."
        ) from None
    with container:
        if not container.streams.audio:
            raise MediaUndecodableError("The file holds no sound track.")
        stream = container.streams.audio[0]
        stream.codec_context.thread_count = 1  # sounds are decoded fast enough; 0 is one per core
        seconds = 0.0
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        mixer.promise(round(seconds * stream.sample_rate), stream.channels, stream.sample_rate)
        # Converts samples only: rate and layout stay. Not planar: PyAV then reads past the planes
        # of eight channels.
        resampler = av.AudioResampler(format="flt")
        for frame in itertools.chain(container.decode(stream), (None,)):
            for part in resampler.resample(frame):
                samples = part.to_ndarray().reshape(-1, part.layout.nb_channels)
                mixer.add(samples, part.sample_rate)


def read_samples(values: Any) -> np.ndarray:
    """The caller's samples as a numpy array, of their own type and shape.

    Raises InvalidRequestError for lists of different lengths, for tensors that are not dense, and
    for types that ``decode_object`` does not take.
    """
    if is_tensor(values):
        array = _of_tensor(values, sys.modules["torch"])
    else:
        try:
            array = np.asarray(values)
        except (ValueError, TypeError, OverflowError, RuntimeError):
            raise InvalidRequestError(
                "The samples of a sound must be numbers in one list, or in lists of equal length."
            ) from None
    if array.dtype.kind != "f" and array.dtype not in FULL_SCALE and array.dtype != np.uint8:
        _refuse_type(array.dtype)
    return array


def _of_tensor(values: Any, torch: Any) -> np.ndarray:
    if values.layout != torch.strided or values.is_quantized or values.is_meta:
        raise InvalidRequestError("The samples of a sound must be an ordinary dense tensor.")
    tensor = values.detach().cpu()
    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    try:
        array: np.ndarray = wide.numpy()
    except (TypeError, RuntimeError):  # a type that numpy lacks, or conjugate numbers
        _refuse_type(tensor.dtype)
    return array


def _refuse_type(dtype: object) -> NoReturn:
    raise InvalidRequestError(
        "The samples of a sound must be floats, or integers of type int16, int32 or uint8, got "
        f"{dtype}."
    )


def _scaled(array: np.ndarray) -> np.ndarray:
    """Samples of a type that ``read_samples`` lets pass as float32, full scale from -1 to 1."""
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused
            return array.astype(np.float32)
    if array.dtype in FULL_SCALE:
        return (array / FULL_SCALE[array.dtype]).astype(np.float32)
    return (array.astype(np.float32) - 128) / 128


def _mixed(samples: np.ndarray) -> np.ndarray:
    """(n, channels) -> (n,), in new memory."""
    with np.errstate(invalid="ignore", over="ignore"):  # infinite samples are refused later
        mean: np.ndarray = samples.mean(axis=1, dtype=np.float32)
    return mean


def _at_rate(samples: np.ndarray, source_rate: int, rate: int) -> Audio:
    """The sound at the model's rate.

    Raises MediaUndecodableError when nothing is left of it, or nothing finite.
    """
    if source_rate == rate:
        return Audio(np.ascontiguousarray(samples), rate)
    import soxr

    resampled = soxr.resample(samples, source_rate, rate)
    if not resampled.size:
        raise MediaUndecodableError(
            f"The sound is too short: {samples.size} samples of {source_rate} per second are none "
            f"of {rate} per second."
        )
    if not np.isfinite(resampled).all():
        raise MediaUndecodableError(
            f"The sound has samples of up to {np.abs(samples).max():.3g}, too large to be "
            "resampled: full scale is 1."
        )
    return Audio(np.ascontiguousarray(resampled, dtype=np.float32), rate)
