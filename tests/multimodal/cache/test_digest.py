import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sensorium.multimodal.cache import digest
from sensorium.multimodal.items import Features
from tests.multimodal.support import encoded, picture

fields = st.lists(
    st.binary(max_size=4) | st.text(max_size=4) | st.integers(-(2**70), 2**70), max_size=4
)


@given(st.text(max_size=3), fields, st.text(max_size=3), fields)
def test_framing_is_injective(tag, some, other_tag, others) -> None:
    same = digest.framed(tag, some) == digest.framed(other_tag, others)
    assert same == ((tag, some) == (other_tag, others))


def with_exif(image: Image.Image, turn: int) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = turn
    return Image.open(io.BytesIO(encoded(image, "PNG", exif=exif.tobytes())))


def near_collisions() -> dict[str, object]:
    """Things that are not the same picture, though much of them is."""
    zeros = Image.new("L", (30, 100))
    palette = zeros.convert("P")
    palette.putpalette([0, 0, 0, 1, 1, 1])
    other_palette = palette.copy()
    other_palette.putpalette([9, 0, 0, 1, 1, 1])
    clear_palette = palette.copy()
    clear_palette.info["transparency"] = 0
    half_palette = palette.copy()
    half_palette.info["transparency"] = b"\x80"
    keyed = zeros.copy()
    keyed.info["transparency"] = 0
    rgb = Image.new("RGB", (30, 100))
    array = np.zeros((100, 30, 3), np.uint8)
    return {
        "L 30x100": zeros,
        "L 100x30": Image.new("L", (100, 30)),
        "L 50x60": Image.new("L", (50, 60)),
        "L keyed": keyed,
        "1": Image.new("1", (30, 100)),
        "P": palette,
        "P other palette": other_palette,
        "P clear": clear_palette,
        "P half": half_palette,
        "RGB": rgb,
        "HSV": Image.new("HSV", (30, 100)),
        "YCbCr": Image.new("YCbCr", (30, 100), 0),
        "RGBA clear": Image.new("RGBA", (30, 100)),
        "RGBA opaque": Image.new("RGBA", (30, 100), (0, 0, 0, 255)),
        "CMYK": Image.new("CMYK", (30, 100)),
        "LA": Image.new("LA", (30, 100)),
        "I;16": Image.new("I;16", (30, 100)),
        "I": Image.new("I", (30, 100)),
        "turned 3": with_exif(rgb, 3),
        "turned 6": with_exif(rgb, 6),
        "numpy": array,
        "numpy turned": np.zeros((30, 100, 3), np.uint8),
        "numpy as words": np.zeros((100, 15, 3), np.uint16),
        "numpy signed": array.view(np.int8),
        "torch": torch.zeros(3, 100, 30, dtype=torch.uint8),
        "torch turned": torch.zeros(3, 30, 100, dtype=torch.uint8),
        "torch float": torch.zeros(3, 100, 30),
        "torch half": torch.zeros(3, 100, 30, dtype=torch.float16),
        "torch bfloat16": torch.zeros(3, 100, 30, dtype=torch.bfloat16),
    }


def test_near_collisions_have_digests_of_their_own() -> None:
    found = {name: digest.object_digest(thing) for name, thing in near_collisions().items()}
    for (name, one), (other_name, other) in itertools.combinations(found.items(), 2):
        assert one != other, (name, other_name)
    assert all(len(value) == 32 for value in found.values())


def test_equal_content_has_equal_digests() -> None:
    source = picture(9, 7)
    array = np.asarray(source)
    assert digest.object_digest(source) == digest.object_digest(source.copy())
    assert digest.object_digest(array) == digest.object_digest(np.asfortranarray(array))
    tensor = torch.from_numpy(array.copy())
    chw = tensor.permute(2, 0, 1)
    assert digest.object_digest(chw) == digest.object_digest(chw.contiguous())
    assert digest.encoded_digest(b"abc") == digest.encoded_digest(b"abc")
    upright = with_exif(source, 1)
    assert digest.object_digest(upright) == digest.object_digest(source)


@given(st.integers(0, 9 * 7 * 3 - 1), st.integers(1, 255))
def test_every_byte_counts(place: int, change: int) -> None:
    array = np.asarray(picture(9, 7)).copy()
    before = digest.object_digest(array), digest.object_digest(Image.fromarray(array))
    array.reshape(-1)[place] ^= change
    after = digest.object_digest(array), digest.object_digest(Image.fromarray(array))
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_encoded_bytes_and_decoded_content_are_told_apart() -> None:
    array = np.zeros(4, np.uint8)
    assert digest.encoded_digest(array.tobytes()) != digest.object_digest(array)


def test_everything_of_an_id_counts() -> None:
    base = digest.uuid_digest("image", "a", tenant="t", salt="s")
    others = [
        digest.uuid_digest("video", "a", tenant="t", salt="s"),
        digest.uuid_digest("image", "b", tenant="t", salt="s"),
        digest.uuid_digest("image", "a", tenant="u", salt="s"),
        digest.uuid_digest("image", "a", tenant="t", salt=""),
        digest.uuid_digest("image", "a", tenant="ts", salt=""),
        digest.uuid_digest("image", "sa", tenant="t", salt=""),
        digest.encoded_digest(b"a"),
    ]
    assert len({base, *others}) == 8


def test_options_and_processor_count() -> None:
    content = digest.encoded_digest(b"a")
    base = digest.item_digest("image", content, {"a": 1, "b": (1, 2)}, b"p")
    assert base == digest.item_digest("image", content, {"b": [1, 2], "a": 1}, b"p")
    others = [
        digest.item_digest("video", content, {"a": 1, "b": (1, 2)}, b"p"),
        digest.item_digest("image", digest.encoded_digest(b"b"), {"a": 1, "b": (1, 2)}, b"p"),
        digest.item_digest("image", content, {"a": 1, "b": (1, 3)}, b"p"),
        digest.item_digest("image", content, {"a": "1", "b": (1, 2)}, b"p"),
        digest.item_digest("image", content, {"a": 1}, b"p"),
        digest.item_digest("image", content, {"a": 1, "b": (1, 2)}, b"q"),
    ]
    assert base not in others


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(plain, plain)
def test_the_canonical_text_tells_values_apart(one, other) -> None:
    if repr(one) == repr(other):
        assert digest.canonical(one) == digest.canonical(other)
    if digest.canonical(one) == digest.canonical(other):
        assert one == other


def test_canonical_refuses_what_has_no_plain_form() -> None:
    with pytest.raises(TypeError):
        digest.canonical(object())


def test_features_digests_cover_arrays_and_values() -> None:
    def features(array: np.ndarray, num: int = 2, **meta: object) -> bytes:
        return digest.features_digest(Features("image", {"embeds": array}, num, meta, True))

    embeds = np.zeros((2, 3), np.float32)
    assert features(embeds) == features(embeds.copy())
    others = [
        features(embeds, 3),
        features(embeds, grid=(1, 2, 3)),
        features(embeds, grid=np.array([1, 2, 3])),
        features(embeds.reshape(3, 2)),
        features(embeds + 1),
        features(embeds.astype(np.int32)),
    ]
    assert len({features(embeds), *others}) == 7
