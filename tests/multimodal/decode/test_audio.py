"""Sounds of every kind come out as one channel at the model's rate.

What is too long, empty or damaged is refused.
"""

from __future__ import annotations

import base64
import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from sensorium.config import MediaConfig
from sensorium.engine.prompts.types import parse_prompt
from sensorium.errors import (
    ConfigError,
    InvalidRequestError,
    MediaTooLargeError,
    MediaUndecodableError,
)
from sensorium.multimodal.cache.digest import object_digest
from sensorium.multimodal.decode.audio import BLOCK_FRAMES, AudioOptions, decode, decode_object
from sensorium.multimodal.decode.loaders import LOADERS
from sensorium.multimodal.items import Audio

RATE = 16000
OPTIONS = AudioOptions()
CONFIG = MediaConfig()


def tone(seconds: float = 0.5, rate: int = RATE, pitch: float = 440.0) -> np.ndarray:
    """float32 samples of a sine."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * pitch * time)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, form: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def muxed(
    samples: np.ndarray, rate: int, container: str, codec: str, with_video: bool = False
) -> bytes:
    """A file of FFmpeg's making: one channel, with a picture track in front if asked for."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        video: Any = None
        if with_video:
            video = file.add_stream("mpeg4", rate=10)
            video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        stream: Any = file.add_stream(codec, rate=rate)
        stream.layout = "mono"
        if video is not None:
            for _ in range(5):
                picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
                file.mux(video.encode(picture))
            file.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def muted() -> bytes:
    """A video without a sound track."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        video: Any = file.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        file.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        file.mux(video.encode(None))
    return buffer.getvalue()


def pitch_of(sound: Audio) -> float:
    """The loudest frequency, in hertz."""
    spectrum = np.abs(np.fft.rfft(sound.samples * np.hanning(len(sound.samples))))
    return float(spectrum.argmax() * sound.rate / len(sound.samples))


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 0),
        ("WAV", "ULAW", 2e-2),
        ("FLAC", None, 1e-4),
        ("AIFF", None, 1e-4),
        ("CAF", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 5e-2),
        ("OGG", "OPUS", 5e-2),
    ],
)
def test_files_of_libsndfile(form: str, subtype: str | None, tolerance: float) -> None:
    samples = tone()
    sound = decode(encoded(samples, RATE, form, subtype), OPTIONS, CONFIG, RATE)
    assert (sound.samples.dtype, sound.rate, sound.samples.shape) == (np.float32, RATE, (8000,))
    inner = slice(200, -200)  # codecs fade at the ends
    np.testing.assert_allclose(sound.samples[inner], samples[inner], atol=tolerance, rtol=0)
    assert sound.samples.flags.c_contiguous


def test_mp3() -> None:
    sound = decode(encoded(tone(rate=44100), 44100, "MP3"), OPTIONS, CONFIG, RATE)
    assert abs(pitch_of(sound) - 440) < 4
    assert abs(len(sound.samples) - 8000) < 1600  # the encoder pads


def test_mp3_of_several_blocks_has_no_seams() -> None:
    rate = 44100
    time = np.arange(round(2.5 * BLOCK_FRAMES)) / rate
    samples = 0.5 * np.sin(2 * np.pi * (300 + 40 * time) * time)
    data = encoded(samples, rate, "MP3")
    assert soundfile.info(io.BytesIO(data)).subtype == "MPEG_LAYER_III", "libsndfile reads it"
    found = decode(data, OPTIONS, CONFIG, rate).samples
    np.testing.assert_allclose(found, samples, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("container", "codec", "with_video"),
    [
        ("ipod", "aac", False),
        ("adts", "aac", False),
        ("webm", "libopus", False),
        ("matroska", "aac", False),
        ("mp4", "aac", True),
        ("avi", "mp3", True),
        ("mpegts", "aac", True),
    ],
)
def test_files_of_ffmpeg(container: str, codec: str, with_video: bool) -> None:
    data = muxed(tone(0.5, 48000, 1000.0), 48000, container, codec, with_video)
    sound = decode(data, OPTIONS, CONFIG, RATE)
    assert (sound.samples.dtype, sound.rate) == (np.float32, RATE)
    assert abs(pitch_of(sound) - 1000) < 4
    assert abs(len(sound.samples) - 8000) < 1600
    assert 0.4 < np.abs(sound.samples).max() < 0.6


def test_channels_are_averaged_and_rates_converted() -> None:
    left, right = tone(0.5, 44100, 300), tone(0.5, 44100, 2000)
    data = encoded(np.stack([left, right, 0 * left], axis=1), 44100, "WAV", "FLOAT")
    sound = decode(data, OPTIONS, CONFIG, 44100)
    np.testing.assert_allclose(sound.samples, (left + right) / 3, atol=1e-6)
    for rate in (8000, 16000, 48000):
        assert len(decode(data, OPTIONS, CONFIG, rate).samples) == rate // 2


@pytest.mark.parametrize("layout", ["stereo", "5.1", "7.1", "hexadecagonal"])
def test_channels_of_files_that_only_ffmpeg_reads(layout: str) -> None:
    """Eight and more channels are where planes of samples do not fit the first list of FFmpeg's
    frames.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as file:
        stream: Any = file.add_stream("pcm_f32le", rate=RATE)
        stream.layout = layout
        num = stream.layout.nb_channels
        samples = np.stack([tone(pitch=200.0 * (i + 1)) for i in range(num)], axis=1)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout=layout)
        frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    sound = decode(buffer.getvalue(), OPTIONS, CONFIG, RATE)
    np.testing.assert_allclose(sound.samples, samples.mean(axis=1), atol=1e-6)


def test_resampling_keeps_the_tone_and_drops_what_does_not_fit() -> None:
    kept = decode(encoded(tone(1, 48000, 1000), 48000, "WAV", "FLOAT"), OPTIONS, CONFIG, RATE)
    np.testing.assert_allclose(kept.samples[500:-500], tone(1, RATE, 1000)[500:-500], atol=1e-3)
    gone = decode(encoded(tone(1, 48000, 11000), 48000, "WAV", "FLOAT"), OPTIONS, CONFIG, RATE)
    assert np.abs(gone.samples[500:-500]).max() < 1e-3


def test_long_files_are_read_in_blocks() -> None:
    samples = tone(10, 32000)
    sound = decode(encoded(samples, 32000, "WAV", "FLOAT"), OPTIONS, CONFIG, 32000)
    np.testing.assert_array_equal(sound.samples, samples)


WAV = encoded(tone(), RATE, "WAV", "PCM_16")
M4A = muxed(tone(), RATE, "ipod", "aac")
PICTURE = io.BytesIO()
Image.new("RGB", (4, 4)).save(PICTURE, "PNG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"RIFF",
        b"hello, this is no sound",
        bytes(5000),
        WAV[:20],
        M4A[: len(M4A) // 2],
        PICTURE.getvalue(),
        muted(),
        encoded(tone()[:0], RATE, "WAV"),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '/etc/hostname'\n",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_holds_no_sound(data: bytes) -> None:
    with pytest.raises(MediaUndecodableError) as caught:
        decode(data, OPTIONS, CONFIG, RATE)
    assert "0x" not in caught.value.message
    assert "/etc" not in caught.value.message


def test_damaged_files_are_refused_or_read_as_far_as_they_go() -> None:
    rng = np.random.default_rng(0)
    for whole in (WAV, M4A, encoded(tone(), RATE, "FLAC"), encoded(tone(), RATE, "OGG")):
        for _ in range(20):
            data = bytearray(whole[: rng.integers(30, len(whole))])
            for place in rng.integers(0, len(data), 3):
                data[place] ^= rng.integers(1, 256)
            try:
                sound = decode(bytes(data), OPTIONS, CONFIG, RATE)
            except (MediaUndecodableError, MediaTooLargeError):
                continue
            assert np.isfinite(sound.samples).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite(bad: float) -> None:
    samples = tone()
    samples[77] = bad
    with pytest.raises(MediaUndecodableError, match="NaN or infinite"):
        decode(encoded(samples, RATE, "WAV", "FLOAT"), OPTIONS, CONFIG, RATE)
    with pytest.raises(InvalidRequestError, match="NaN or infinite"):
        decode_object((samples, RATE), OPTIONS, CONFIG, RATE)


def test_samples_that_resampling_cannot_take() -> None:
    samples = np.tile(np.array([3e38, -3e38], np.float32), 500)
    assert decode_object((samples, RATE), OPTIONS, CONFIG, RATE).samples.max() > 1e38
    for read, source in (
        (decode, encoded(samples, 44100, "WAV", "FLOAT")),
        (decode_object, (samples, 44100)),
    ):
        with pytest.raises(MediaUndecodableError, match=r"up to 3e\+38, too large"):
            read(source, OPTIONS, CONFIG, RATE)


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [WAV, M4A, encoded(tone(), RATE, "OGG")])
def test_longest_sound(data: bytes) -> None:
    long = MediaConfig(max_audio_seconds=1)
    assert decode(data, OPTIONS, long, RATE).rate == RATE
    longer = (
        encoded(tone(1.2), RATE, "WAV") if data is WAV else muxed(tone(1.2), RATE, "ipod", "aac")
    )
    with pytest.raises(
        MediaTooLargeError, match=r"1\.[23]\d seconds.*at most 1 .*--max-audio-seconds"
    ):
        decode(longer, OPTIONS, long, RATE)
    with pytest.raises(MediaTooLargeError, match="--max-audio-seconds"):
        decode_object((tone(1.01), RATE), OPTIONS, long, RATE)


def test_most_decoded_bytes_count_all_channels() -> None:
    stereo = np.stack([tone(), tone()], axis=1)
    fits, tight = (MediaConfig(max_audio_decoded_bytes=n) for n in (64000, 63999))
    for read, source in ((decode, encoded(stereo, RATE, "WAV")), (decode_object, (stereo, RATE))):
        assert read(source, OPTIONS, fits, RATE).samples.size == 8000
        with pytest.raises(MediaTooLargeError, match=r"64000 bytes.*--max-audio-decoded-bytes"):
            read(source, OPTIONS, tight, RATE)


def test_a_header_without_a_length_does_not_help() -> None:
    """Matroska files of a stream tell no duration: the limit acts while decoding."""
    data = muxed(tone(1.5), RATE, "adts", "aac")
    with pytest.raises(MediaTooLargeError, match="--max-audio-seconds"):
        decode(data, OPTIONS, MediaConfig(max_audio_seconds=1), RATE)


def test_a_header_that_promises_too_much_is_refused_before_decoding() -> None:
    """FLAC keeps the number of samples in 36 bits of its header."""
    data = bytearray(encoded(tone(), RATE, "FLAC"))
    data[21] |= 0x0F
    with pytest.raises(MediaTooLargeError, match="--max-audio-seconds"):
        decode(bytes(data), OPTIONS, CONFIG, RATE)


def test_rates_of_no_sound() -> None:
    """The rate of a WAV file stands in bytes 24 to 27."""
    data = bytearray(encoded(tone(), RATE, "WAV"))
    for rate in (768_001, 2**31 - 1):
        data[24:28] = rate.to_bytes(4, "little")
        with pytest.raises(MediaUndecodableError, match=f"1 channels of {rate} samples"):
            decode(bytes(data), OPTIONS, CONFIG, RATE)


def test_limits_are_checked_themselves() -> None:
    for name in ("max_audio_seconds", "max_audio_decoded_bytes"):
        with pytest.raises(ConfigError, match=name):
            MediaConfig(**{name: 0})


# --- objects --------------------------------------------------------------------------------------


def test_kinds_of_samples() -> None:
    samples = tone()
    for values, tolerance in (
        (samples, 0),
        (samples.astype(np.float64), 0),
        (samples.astype(np.float16), 1e-3),
        ((samples * 32768).astype(np.int16), 1e-4),
        ((samples * 2.0**31).astype(np.int32), 1e-6),
        ((samples * 128 + 128).astype(np.uint8), 1e-2),
        (samples.tolist(), 0),
        (torch.from_numpy(samples), 0),
        (torch.from_numpy(samples).bfloat16(), 1e-2),
        (torch.from_numpy(samples).requires_grad_(), 0),
        ((torch.from_numpy(samples) * 32768).short(), 1e-4),
        (samples.astype(">f4"), 0),
    ):
        for rate in (RATE, np.int64(RATE), float(RATE)):
            sound = decode_object((values, rate), OPTIONS, CONFIG, RATE)
            assert (sound.samples.dtype, sound.rate) == (np.float32, RATE)
            np.testing.assert_allclose(sound.samples, samples, atol=tolerance, rtol=0)


def test_both_orders_of_axes() -> None:
    channels = np.stack([tone(pitch=300), tone(pitch=500)])
    for values in (channels, channels.T, channels.tolist(), torch.from_numpy(channels).T):
        sound = decode_object((values, RATE), OPTIONS, CONFIG, RATE)
        np.testing.assert_allclose(sound.samples, channels.mean(axis=0), atol=1e-7)
    square = decode_object((np.array([[1.0, 0.0], [0.0, 0.5]]), 2), OPTIONS, CONFIG, 2)
    np.testing.assert_array_equal(square.samples, [0.5, 0.25])
    column = decode_object((tone()[:, None], RATE), OPTIONS, CONFIG, RATE)
    np.testing.assert_array_equal(column.samples, tone())


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 192_000])
def test_any_rate(rate: int) -> None:
    sound = decode_object((tone(0.5, rate, 700), rate), OPTIONS, CONFIG, RATE)
    assert abs(len(sound.samples) - 8000) <= 1
    assert abs(pitch_of(sound) - 700) < 4


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(0, np.float32),
        np.zeros((2, 0)),
        np.zeros((1, 2, 100)),
        np.float32(1),
        np.zeros(100, np.int64),
        np.zeros(100, np.uint16),
        np.zeros(100, bool),
        np.zeros(100, complex),
        [1, 2, 3],
        [[0.1, 0.2], [0.3]],
        ["a", "b"],
        [],
        torch.zeros(5).to_sparse(),
        torch.zeros(5, device="meta"),
        np.array([1e300, 0.0]),
    ],
    ids=lambda v: f"{type(v).__name__}{getattr(v, 'shape', '')}",
)
def test_other_objects_are_refused(values: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode_object((values, RATE), OPTIONS, CONFIG, RATE)
    assert "0x" not in caught.value.message


@pytest.mark.parametrize(
    "values",
    [
        np.array([0.5, None]),
        [0.5, object()],
        [[0.5], [0.5, 0.25]],
        torch.zeros(5).to_sparse(),
        torch.zeros(5).to(torch.float8_e4m3fn),
        torch.zeros(5, dtype=torch.complex64).conj(),
    ],
    ids=lambda v: f"{type(v).__name__} {getattr(v, 'dtype', '')}",
)
def test_what_cannot_be_hashed_is_refused_before(values: Any) -> None:
    data = {"prompt": "a", "multi_modal_data": {"audio": (values, RATE)}}
    with pytest.raises(InvalidRequestError, match="samples of a sound must be") as caught:
        parse_prompt(data, enable_mm_embeds=False)
    assert caught.value.param == "prompt.multi_modal_data.audio"


def test_what_is_left_of_a_click() -> None:
    assert decode_object(([0.5], RATE), OPTIONS, CONFIG, RATE).samples.tolist() == [0.5]
    with pytest.raises(MediaUndecodableError, match="too short: 1 samples of 48000"):
        decode_object(([0.5], 48000), OPTIONS, CONFIG, RATE)


def test_the_callers_samples_stay_as_they_are() -> None:
    samples = tone()
    before = samples.copy()
    sound = decode_object((samples, RATE), OPTIONS, CONFIG, RATE)
    samples[:] = 0
    np.testing.assert_array_equal(sound.samples, before)


# --- options and the way there --------------------------------------------------------------------


def test_options() -> None:
    loader = LOADERS["audio"]
    assert loader.options.parse({}, "media_io_kwargs.audio") == AudioOptions()
    with pytest.raises(InvalidRequestError, match=r"'mono'.*sounds have none") as caught:
        loader.options.parse({"mono": True}, "media_io_kwargs.audio")
    assert caught.value.param == "media_io_kwargs.audio"
    with pytest.raises(InvalidRequestError, match="must be a mapping"):
        AudioOptions.parse([])  # type: ignore[arg-type]


def test_lists_of_samples_have_an_identity_each() -> None:
    lists: list[Any] = [
        [0.5, 0.25],
        [0.5, 0.75],
        [0.5],
        [[0.5], [0.25]],
        [[0.5, 0.25]],
        [1, 2],
        [1.0, 2.0],
        [True, False],
        [[0.5, 0.25], [0.5]],
        [10**30, 1],
        [],
    ]
    digests = [object_digest((values, RATE)) for values in lists]
    assert len(set(digests)) == len(lists)
    assert digests == [object_digest((values, RATE)) for values in lists]
    assert object_digest((lists[0], RATE + 1)) not in digests


def test_base64_text_of_a_part_is_read_by_its_content() -> None:
    """``input_audio`` becomes a data: URL; what it calls the format is not believed."""
    from sensorium.multimodal.fetch.data_url import parse_data_url
    from sensorium.multimodal.parse.messages import ref_from_part

    data = base64.b64encode(M4A).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    ref = ref_from_part(part, "messages[0].content[0]")
    assert ref.modality == "audio"
    sound = decode(parse_data_url(ref.source, 1 << 20), OPTIONS, CONFIG, RATE)
    assert abs(pitch_of(sound) - 440) < 4
