"""Identity: different things never share a cache entry, equal things do, through the way that
every request takes.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from sensorium.engine.prompts.types import ChatPrompt, MediaOptions, RawPrompt
from sensorium.multimodal.cache import digest
from sensorium.multimodal.items import MediaRef
from sensorium.text.chat.chat_template import parse_messages
from tests.multimodal.clips import make_clip
from tests.reliability.asking import Offline, audio, image, video
from tests.reliability.media import RATE, data_url, encoded, picture, sound, tone
from tests.reliability.test_images import turned

PLACEHOLDERS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "audio": "<|audio|>",
}


def identity(model: Offline, ref: MediaRef, **media: Any) -> bytes:
    """The digest under which a model keeps an item."""
    prompt = RawPrompt(text=PLACEHOLDERS[ref.modality], refs=(ref,), media=MediaOptions(**media))
    return _digest(model, prompt)


def identity_of_part(model: Offline, part: dict[str, Any], **media: Any) -> bytes:
    """The same of a part of a message."""
    messages = parse_messages([{"role": "user", "content": [part]}])
    return _digest(model, ChatPrompt(conversation=messages, media=MediaOptions(**media)))


def _digest(model: Offline, prompt: RawPrompt | ChatPrompt) -> bytes:
    prepared = model.parts.run(model.parts.processor.prepare(prompt))
    (span,) = prepared.spans
    return span.digest


def of(modality: Any, source: Any, uuid: str | None = None) -> MediaRef:
    return MediaRef(modality, "object", source, uuid, "here")


def all_differ(found: dict[str, bytes]) -> None:
    for (name, one), (other_name, other) in itertools.combinations(found.items(), 2):
        assert one != other, (name, other_name)
    assert {len(value) for value in found.values()} == {32}


def palette(*colours: int, clear: object = None) -> Image.Image:
    found = Image.new("P", (30, 100))
    found.putpalette(colours)
    if clear is not None:
        found.info["transparency"] = clear
    return found


def test_images_that_nearly_collide(offline: Offline) -> None:
    """CVE-2025-46722: a hash of the pixels alone took 30 x 100 for 100 x 30, a palette for grey,
    and opaque for clear. Mode, size, palette, alpha, orientation, type and order of axes all
    count.
    """
    black = Image.new("RGB", (30, 100))
    exif = Image.open(io.BytesIO(turned(black, 6)))
    exif.load()
    sources: dict[str, Any] = {
        "30 x 100": black,
        "100 x 30": Image.new("RGB", (100, 30)),
        "60 x 50": Image.new("RGB", (60, 50)),
        "grey": Image.new("L", (30, 100)),
        "grey of 90 columns": Image.new("L", (90, 100)),
        "one bit": Image.new("1", (30, 100)),
        "clear": Image.new("RGBA", (30, 100)),
        "opaque": Image.new("RGBA", (30, 100), (0, 0, 0, 255)),
        "CMYK": Image.new("CMYK", (30, 100)),
        "grey and alpha": Image.new("LA", (30, 100)),
        "palette": palette(0, 0, 0, 1, 1, 1),
        "another palette": palette(9, 0, 0, 1, 1, 1),
        "a clear colour": palette(0, 0, 0, 1, 1, 1, clear=0),
        "half a clear colour": palette(0, 0, 0, 1, 1, 1, clear=b"\x80"),
        "16 bits": Image.new("I;16", (30, 100)),
        "turned": exif,
        "numpy": np.zeros((100, 30, 3), np.uint8),
        "numpy turned": np.zeros((30, 100, 3), np.uint8),
        "torch": torch.zeros(3, 100, 30, dtype=torch.uint8),
        "torch of floats": torch.zeros(3, 100, 30),
    }
    all_differ({name: identity(offline, of("image", source)) for name, source in sources.items()})


def test_files_that_nearly_collide(offline: Offline) -> None:
    """One picture in several files is as many items, and none of them that of its pixels as an
    object.
    """
    source = picture(56, 28)
    files = {
        "PNG": encoded(source),
        "PNG, more of it": encoded(source) + b"\0",
        "PNG, other chunks": encoded(source, compress_level=1),
        "BMP": encoded(source, "BMP"),
        "WebP": encoded(source, "WEBP", lossless=True),
        **{f"turned {turn}": turned(source, turn) for turn in range(1, 9)},
    }
    found = {name: identity_of_part(offline, image(data_url(data))) for name, data in files.items()}
    found["object"] = identity(offline, of("image", source))
    found["clip of it"] = identity_of_part(offline, video(data_url(files["PNG"], "video/jpeg")))
    all_differ(found)


def test_clips_that_nearly_collide(offline: Offline) -> None:
    """Order of frames, their number, size, rate and metadata count.

    And a clip of one frame is no picture.
    """
    frames = np.random.default_rng(0).integers(0, 256, (4, 28, 56, 3), dtype=np.uint8)
    sources: dict[str, Any] = {
        "array": frames,
        "backwards": frames[::-1],
        "rolled": np.roll(frames, 1, axis=0),
        "fewer": frames[:2],
        "turned": frames.transpose(0, 2, 1, 3),
        "colours turned": frames[..., ::-1],
        "list": [Image.fromarray(frame) for frame in frames],
        "torch": torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()),
        "one frame": frames[:1],
        "rate": (frames, {"fps": 2.0}),
        "another rate": (frames, {"fps": 4.0}),
        "longer source": (frames, {"fps": 2.0, "total_num_frames": 8}),
        "frames of it": (frames, {"total_num_frames": 8, "frames_indices": [0, 1, 2, 3]}),
        "other frames of it": (frames, {"total_num_frames": 8, "frames_indices": [0, 2, 4, 6]}),
    }
    found = {name: identity(offline, of("video", source)) for name, source in sources.items()}
    found["picture"] = identity(offline, of("image", frames[0]))
    all_differ(found)


def test_sounds_that_nearly_collide(sounds: Offline) -> None:
    """Rate, type, number and order of channels, and which axis they are on."""
    mono = tone(0.1)
    pair = np.stack([mono, -0.5 * mono])
    sources: dict[str, Any] = {
        "mono": (mono, RATE),
        "another rate": (mono, RATE // 2),
        "backwards": (mono[::-1], RATE),
        "doubles": (mono.astype(np.float64), RATE),
        "16 bits": ((mono * 32767).astype(np.int16), RATE),
        "one channel of two axes": (mono[None], RATE),
        "two channels": (pair, RATE),
        "two channels the other way": (pair[::-1], RATE),
        "two channels as columns": (pair.T, RATE),
        "one after the other": (pair.reshape(-1), RATE),
        "torch": (torch.from_numpy(mono), RATE),
        "list": (mono.tolist(), RATE),
        "shorter": (mono[:-1], RATE),
    }
    found = {name: identity(sounds, of("audio", source)) for name, source in sources.items()}
    for form in ("WAV", "FLAC"):
        found[form] = identity_of_part(sounds, audio(data_url(sound(mono, form=form), "audio/x")))
    all_differ(found)


def test_options_are_part_of_the_identity(offline: Offline) -> None:
    """What loading and the processor are told.

    As options of a request, they must not share what others cached.
    """
    clear = image(data_url(encoded(Image.new("RGBA", (56, 28)))))
    clip = video(data_url(make_clip("mp4", 12), "video/mp4"))
    red = {"image": {"rgba_background_color": [255, 0, 0]}}
    blue = {"image": {"rgba_background_color": [0, 0, 255]}}
    all_differ(
        {
            "picture": identity_of_part(offline, clear),
            "over red": identity_of_part(offline, clear, media_io_kwargs=red),
            "over blue": identity_of_part(offline, clear, media_io_kwargs=blue),
            "small": identity_of_part(
                offline, clear, mm_processor_kwargs={"max_pixels": 14000, "min_pixels": 3136}
            ),
            "smaller": identity_of_part(
                offline, clear, mm_processor_kwargs={"max_pixels": 3136, "min_pixels": 3136}
            ),
            "clip": identity_of_part(offline, clip),
            "two frames": identity_of_part(
                offline, clip, media_io_kwargs={"video": {"num_frames": 2}}
            ),
            "four frames": identity_of_part(
                offline, clip, media_io_kwargs={"video": {"num_frames": 4}}
            ),
            "slow": identity_of_part(offline, clip, media_io_kwargs={"video": {"fps": 1}}),
            "frames of the processor": identity_of_part(
                offline, clip, mm_processor_kwargs={"num_frames": 2}
            ),
        }
    )


def test_ids_and_contents_never_meet(offline: Offline) -> None:
    """An id is neither a content nor another tenant's, salt's or modality's id, however they are
    cut.
    """
    source = picture(56, 28)
    scopes: dict[str, dict[str, Any]] = {
        "plain": {},
        "tenant": {"tenant": "a"},
        "salt": {"cache_salt": "a"},
        "tenant and salt": {"tenant": "a", "cache_salt": "b"},
        "salt and tenant": {"tenant": "b", "cache_salt": "a"},
        "both in the tenant": {"tenant": "ab"},
        "both in the salt": {"cache_salt": "ab"},
    }
    content = digest.object_digest(source).hex()
    found = {
        f"{uuid} of {name}": identity(offline, of("image", source, uuid), **scope)
        for name, scope in scopes.items()
        for uuid in ("x", "ax", "abx", content)
    }
    found["content"] = identity(offline, of("image", source))
    clip = np.stack([np.asarray(source)] * 2)
    found["clip"] = identity(offline, of("video", clip, "x"))
    all_differ(found)


SAME: dict[str, Callable[[Path], tuple[list[Any], dict[str, Any]]]] = {
    "bytes by whatever way they come": lambda folder: (
        [
            image(data_url((folder / "picture.png").read_bytes())),
            image(data_url((folder / "picture.png").read_bytes(), "image/jpeg")),
            image(
                "data:image/png;base64,"
                + base64.encodebytes((folder / "picture.png").read_bytes()).decode()
            ),
            image(str(folder / "picture.png")),
            image(f"file://{folder}/inner/picture.png"),
        ],
        {},
    ),
    "defaults that are written out": lambda folder: (
        [image(str(folder / "picture.png"))],
        {"media_io_kwargs": {"image": {"rgba_background_color": (255, 255, 255)}}},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_equal_things_are_one(offline: Offline, folder: Path, name: str) -> None:
    """A picture is loaded once, whether it comes in the request, from a file, or with its
    defaults written out.
    """
    parts, options = SAME[name](folder)
    found = {identity_of_part(offline, part) for part in parts}
    found |= {identity_of_part(offline, part, **options) for part in parts}
    assert len(found) == 1


def test_equal_objects_are_one(offline: Offline, sounds: Offline) -> None:
    """Whatever lies differently in memory, but is equal, is one item; a copy as well."""
    pixels = np.asarray(picture(56, 28))
    equal: list[list[Any]] = [
        [Image.fromarray(pixels), Image.fromarray(pixels).copy(), picture(56, 28)],
        [pixels, pixels.copy(), np.asfortranarray(pixels), np.flip(np.flip(pixels, 1).copy(), 1)],
        [torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.tensor(pixels).permute(2, 0, 1)],
    ]
    for group in equal:
        assert len({identity(offline, of("image", source)) for source in group}) == 1
    frames = np.stack([pixels, pixels[::-1]])
    clips = [frames, frames.copy(), np.asfortranarray(frames)]
    assert len({identity(offline, of("video", source)) for source in clips}) == 1
    samples = np.stack([tone(0.1), tone(0.1)])
    pairs = [(samples, RATE), (np.asfortranarray(samples), RATE)]
    assert len({identity(sounds, of("audio", source)) for source in pairs}) == 1


# --- for all --------------------------------------------------------------------------------------

TYPES = st.sampled_from([np.uint8, np.int8, np.uint16, np.int16, np.float32])
SHAPES = arrays.array_shapes(min_dims=1, max_dims=4, max_side=4)
ARRAYS = TYPES.flatmap(
    lambda kind: arrays.arrays(kind, SHAPES, elements=st.integers(0, 2).map(kind))
)
THINGS = st.one_of(
    ARRAYS,
    st.lists(ARRAYS, max_size=3),
    st.tuples(ARRAYS, st.integers(0, 3)),
    st.tuples(ARRAYS, st.dictionaries(st.sampled_from(["fps", "duration"]), st.integers(0, 2))),
)


def spelled(thing: Any) -> Any:
    """What makes a thing what it is, as plain values."""
    if isinstance(thing, np.ndarray):
        return ("array", thing.dtype.str, thing.shape, thing.tobytes())
    if isinstance(thing, list | tuple):
        return ("list", *map(spelled, thing))
    if isinstance(thing, dict):
        return ("plain", tuple(sorted((key, repr(value)) for key, value in thing.items())))
    return ("plain", repr(thing))


@settings(deadline=None, max_examples=100)
@given(THINGS, THINGS)
def test_digests_are_equal_for_equal_things_alone(one: Any, other: Any) -> None:
    """For any two arrays, lists of frames, pairs with a rate or with metadata."""
    same = digest.object_digest(one) == digest.object_digest(other)
    assert same == (spelled(one) == spelled(other))


SCOPES = st.tuples(*[st.text("ab", max_size=2)] * 3, st.sampled_from(["image", "video"]))
OPTIONS = st.dictionaries(st.sampled_from("xyz"), st.integers(0, 1) | st.booleans(), max_size=2)


@settings(deadline=None, max_examples=100)
@given(SCOPES, SCOPES, OPTIONS, OPTIONS, st.binary(max_size=2), st.binary(max_size=2))
def test_items_are_equal_for_equal_ids_scopes_and_options_alone(
    one: Any, other: Any, first: Any, second: Any, model: bytes, other_model: bytes
) -> None:
    """For any ids, tenants, salts, modalities, options and processors."""

    def item(scope: Any, options: Any, processor: bytes) -> bytes:
        uuid, tenant, salt, modality = scope
        content = digest.uuid_digest(modality, uuid, tenant=tenant, salt=salt)
        return digest.item_digest(modality, content, options, processor)

    same = item(one, first, model) == item(other, second, other_model)
    assert same == ((one, spelled(first), model) == (other, spelled(second), other_model))
