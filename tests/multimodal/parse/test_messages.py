import base64

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium.errors import InvalidRequestError
from sensorium.multimodal.decode.image import ImageFeatureData, ImagePixelData
from sensorium.multimodal.parse.messages import (
    MEDIA_PART_TYPES,
    media_part_type,
    ref_from_part,
    refs_from_data,
)
from tests.multimodal.support import picture

PIL = picture()
ARRAY = np.zeros((4, 5, 3), np.uint8)
CHW = torch.zeros(3, 4, 5, dtype=torch.uint8)
CHW_FLOAT = torch.zeros(3, 4, 5)
ONE = torch.zeros(4, 8)
MANY = torch.zeros(2, 4, 8)
GRID = {"image_embeds": ONE, "image_grid_thw": torch.tensor([[1, 2, 2]])}
SIZED = {"image_embeds": "AAAA", "image_sizes": [[20, 30]]}


def kinds(value: object, uuids: object = None, **options: object) -> list[tuple[str, str]]:
    refs = refs_from_data({"image": value}, uuids, **options)
    assert all(ref.modality == "image" for ref in refs)
    return [(ref.kind, ref.param.removeprefix("multi_modal_data.")) for ref in refs]


@pytest.mark.parametrize(
    "one", [PIL, ARRAY, CHW, CHW_FLOAT], ids=["pil", "numpy", "uint8", "float"]
)
def test_pictures_alone_and_in_lists(one: object) -> None:
    assert kinds(one) == [("object", "image")]
    assert kinds([one, one]) == [("object", "image[0]"), ("object", "image[1]")]
    assert kinds((one,)) == [("object", "image[0]")]
    assert kinds([one], enable_mm_embeds=True) == [("object", "image[0]")]


def test_mixed_kinds_of_pictures() -> None:
    assert [kind for kind, _ in kinds([PIL, ARRAY, CHW, CHW_FLOAT])] == ["object"] * 4


def test_embeddings() -> None:
    assert kinds(MANY, enable_mm_embeds=True) == [("embeds", "image")]
    assert kinds(torch.zeros(3, 4, 8), enable_mm_embeds=True) == [("embeds", "image")]
    assert kinds(MANY) == [("embeds", "image")]  # refused later, for not being enabled
    assert kinds(ONE) == [("embeds", "image")]
    assert kinds([ONE, ONE]) == [("embeds", "image[0]"), ("embeds", "image[1]")]
    assert kinds(GRID) == [("embeds", "image")]
    assert kinds([PIL, ONE, CHW]) == [
        ("object", "image[0]"),
        ("embeds", "image[1]"),
        ("object", "image[2]"),
    ]
    assert kinds([PIL, ONE[None]], enable_mm_embeds=True)[1] == ("embeds", "image[1]")
    assert kinds([GRID, GRID]) == [("embeds", "image[0]"), ("embeds", "image[1]")]
    assert kinds(MANY.to_sparse(), enable_mm_embeds=True) == [("embeds", "image")]


def test_nothing_and_empty() -> None:
    assert refs_from_data(None) == []
    assert refs_from_data({}) == []
    assert refs_from_data({"image": []}) == []


@pytest.mark.parametrize(
    ("value", "param", "words"),
    [
        ("a.png", "image", "chat message"),
        (["https://a"], "image[0]", "chat message"),
        ([PIL, 3], "image[1]", "int"),
        ([PIL, [PIL]], "image[1]", "list"),
        (np.zeros((4, 5, 3), np.int64), "image", "uint8"),
        ([PIL, np.zeros((3, 4, 5), np.uint8)], "image[1]", "height, width, 3"),
        (torch.zeros(1, 3, 4, 5), "image", "3, height, width"),
        ([torch.zeros(4, 4, 5)], "image[0]", "3, height, width"),
        ([None], "image[0]", "neither data nor an id"),
        (None, "image", "neither data nor an id"),
    ],
)
def test_mistakes_are_named_with_their_place(value: object, param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        refs_from_data({"image": value})
    assert caught.value.param == f"multi_modal_data.{param}"
    with pytest.raises(InvalidRequestError) as caught:
        refs_from_data({"image": value}, param="prompts[3].multi_modal_data")
    assert caught.value.param == f"prompts[3].multi_modal_data.{param}"


NESTED = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("modality", "value", "words"),
    [
        ("audio", (np.zeros(5, np.float32), 10**400), "from 1 to 768000 per second, got 1000"),
        ("audio", (np.zeros(5, np.float32), float("nan")), "from 1 to 768000 per second, got nan"),
        ("audio", (np.zeros(5, np.float32), 8000.5), "from 1 to 768000 per second, got 8000.5"),
        ("image", NESTED, "not a nested one"),
        ("image", [NESTED], "not a nested one"),
        ("video", NESTED, "not a nested one"),
        ("video", [[NESTED]], "ordinary dense tensor"),
    ],
    ids=range(7),
)
@pytest.mark.parametrize("enabled", [False, True])
def test_values_that_break_arithmetic(
    modality: str, value: object, words: str, enabled: bool
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        refs_from_data({modality: value}, enable_mm_embeds=enabled)
    assert caught.value.param is not None
    assert caught.value.param.startswith(f"multi_modal_data.{modality}")
    assert len(caught.value.message) < 250


def test_unknown_modalities() -> None:
    with pytest.raises(InvalidRequestError, match="Did you mean 'image'") as caught:
        refs_from_data({"images": PIL})
    assert caught.value.param == "multi_modal_data.images"
    for data in ([PIL], PIL, "x"):
        with pytest.raises(InvalidRequestError, match="mapping"):
            refs_from_data(data)


def test_ids() -> None:
    refs = refs_from_data({"image": [PIL, None, PIL]}, {"image": ["a", "b", None]})
    assert [(ref.kind, ref.uuid) for ref in refs] == [
        ("object", "a"),
        ("cached", "b"),
        ("object", None),
    ]
    assert refs_from_data({"image": PIL}, {"image": "a"})[0].uuid == "a"
    assert refs_from_data({"image": None}, {"image": "a"})[0].kind == "cached"
    assert refs_from_data({"image": ONE}, {"image": ["a"]})[0].uuid == "a"
    several = refs_from_data({"image": MANY}, {"image": ["a", None]}, enable_mm_embeds=True)
    assert [(ref.uuid, ref.uuids) for ref in several] == [(None, ("a", None))]
    assert refs_from_data({"image": PIL}, None)[0].uuid is None


def test_long_ids_stand_for_themselves_in_short() -> None:
    """The guide's own audio example has the URL of its sound as the id."""
    long, other = "data:audio/ogg;base64," + "a" * 200_000, "data:audio/ogg;base64," + "a" * 199_999
    ids = [
        refs_from_data({"image": PIL}, {"image": name})[0].uuid
        for name in (long, long, other, "a" * 1024, "\ud800" * 2000)
    ]
    assert ids[0] == ids[1] != ids[2]
    assert ids[3] == "a" * 1024
    assert all(name is not None and len(name) <= 1024 for name in ids)
    assert ref_from_part({"image_url": {"url": "u"}, "uuid": long}, PLACE).uuid == ids[0]


@pytest.mark.parametrize(
    ("uuids", "param", "words"),
    [
        ({"image": ["a"]}, ".image", "There is 1 id for 2 image items"),
        ({"image": ["a", "b", "c"]}, ".image", "There are 3 ids for 2 image items"),
        ({}, "", "no entry 'image'"),
        ({"video": ["a"]}, "", "no entry 'image'"),
        ({"image": ["a", "b"], "video": ["c"]}, ".video", "no 'video'"),
        ({"image": ["a", 3]}, ".image[1]", "non-empty string"),
        ({"image": ["", "b"]}, ".image[0]", "non-empty string"),
        ({"imag": ["a", "b"]}, ".imag", "Did you mean 'image'"),
        (["a", "b"], "", "mapping"),
    ],
)
def test_mistakes_in_ids(uuids: object, param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        refs_from_data({"image": [PIL, PIL]}, uuids)
    assert caught.value.param == f"multi_modal_uuids{param}"


def test_other_modalities_are_left_to_the_pipeline() -> None:
    refs = refs_from_data({"video": [PIL, PIL], "audio": (ARRAY, 16000)})
    assert [(ref.modality, ref.kind) for ref in refs] == [("video", "object"), ("audio", "object")]


def test_older_spellings() -> None:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        refs = refs_from_data(ImagePixelData(PIL))
    assert refs[0].source is PIL
    with pytest.warns(DeprecationWarning, match="deprecated"):
        refs = refs_from_data(ImageFeatureData(ONE))
    assert refs[0].kind == "embeds"


PLACE = "messages[0].content[1]"
URL = "https://example.com/a.png"


@pytest.mark.parametrize(
    ("part", "kind", "source", "key"),
    [
        (
            {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
            "url",
            URL,
            "image_url",
        ),
        ({"type": "image_url", "image_url": URL}, "url", URL, "image_url"),
        ({"image_url": {"url": URL}}, "url", URL, "image_url"),
        ({"type": "input_image", "image_url": URL, "detail": "auto"}, "url", URL, "image_url"),
        ({"type": "input_image", "input_image": {"url": URL}}, "url", URL, "input_image"),
        ({"type": "image_pil", "image_pil": PIL}, "object", PIL, "image_pil"),
        ({"image_pil": PIL}, "object", PIL, "image_pil"),
        ({"type": "image_embeds", "image_embeds": ONE}, "embeds", ONE, "image_embeds"),
        ({"type": "image_embeds", "image_embeds": "AAAA"}, "embeds", "AAAA", "image_embeds"),
        ({"type": "image_embeds", "image_embeds": GRID}, "embeds", GRID, "image_embeds"),
        ({"type": "image_embeds", "image_embeds": SIZED}, "embeds", SIZED, "image_embeds"),
    ],
)
def test_parts(part: dict, kind: str, source: object, key: str) -> None:
    ref = ref_from_part(part, PLACE)
    assert (ref.modality, ref.kind, ref.uuid) == ("image", kind, None)
    assert ref.source is source
    assert ref.param == f"{PLACE}.{key}"
    assert ref_from_part({**part, "uuid": "a"}, PLACE).uuid == "a"


def test_parts_of_other_modalities() -> None:
    data = base64.b64encode(b"sound").decode()
    for part, modality, source in (
        ({"type": "video_url", "video_url": {"url": URL}}, "video", URL),
        ({"type": "video", "video": "/a.mp4"}, "video", "/a.mp4"),
        ({"type": "audio_url", "audio_url": {"url": URL}}, "audio", URL),
        (
            {"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}},
            "audio",
            f"data:audio/mp3;base64,{data}",
        ),
    ):
        ref = ref_from_part(part, PLACE)
        assert (ref.modality, ref.kind, ref.source) == (modality, "url", source)


def test_a_payload_of_null_with_an_id_names_a_cached_item() -> None:
    for part in (
        {"type": "image_url", "image_url": None, "uuid": "a"},
        {"type": "image_url", "uuid": "a"},
        {"type": "image_url", "image_url": {"url": None}, "uuid": "a"},
        {"type": "image_url", "image_url": {"url": None, "uuid": "a"}},
        {"image_url": None, "uuid": "a"},
        {"type": "image_pil", "image_pil": None, "uuid": "a"},
        {"type": "image_embeds", "image_embeds": None, "uuid": "a"},
    ):
        ref = ref_from_part(part, PLACE)
        assert (ref.kind, ref.source, ref.uuid) == ("cached", None, "a")


@pytest.mark.parametrize(
    ("part", "key", "words"),
    [
        ({"type": "image_url"}, ".image_url", "uuid"),
        ({"type": "image_url", "image_url": None}, ".image_url", "uuid"),
        ({"type": "image_url", "image_url": {}}, ".image_url", "uuid"),
        ({"type": "image_url", "image_url": 3}, ".image_url", "int"),
        ({"type": "image_url", "image_url": {"url": 3}}, ".image_url", "int"),
        ({"type": "image_url", "image_url": ""}, ".image_url", "empty"),
        ({"type": "image_url", "image_url": URL, "uuid": 3}, ".uuid", "non-empty string"),
        ({"type": "image_pil", "image_pil": "x"}, ".image_pil", "PIL.Image"),
        ({"type": "image_embeds", "image_embeds": {}}, ".image_embeds", "base64"),
        ({"type": "image_embeds", "image_embeds": [1.0]}, ".image_embeds", "base64"),
        ({"type": "image_embeds", "image_embeds": [[20, 30]]}, ".image_embeds", "base64"),
        ({"type": "image_embeds", "image_embeds": {"a": [[[1]]]}}, ".image_embeds", "base64"),
        ({"type": "image_embeds", "image_embeds": {"a": [True]}}, ".image_embeds", "base64"),
        (
            {"type": "input_audio", "input_audio": {"data": "x", "format": "../x"}},
            ".input_audio",
            "format",
        ),
        ({"type": "input_audio", "input_audio": "x"}, ".input_audio", "data"),
        ({"type": "image-url", "image_url": URL}, "", "Did you mean 'image_url'"),
        ({"type": 3}, "", "Unknown type"),
        ({}, "", "Unknown type"),
    ],
)
def test_mistakes_in_parts(part: dict, key: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        ref_from_part(part, PLACE)
    assert caught.value.param == f"{PLACE}{key}"


def test_types_of_parts() -> None:
    assert media_part_type({"type": "text", "text": "x", "image_url": "y"}) is None
    assert media_part_type({"text": "x"}) is None
    assert media_part_type({"type": ["image_url"]}) is None
    assert media_part_type({"image_url": "x"}) == "image_url"
    assert all(media_part_type({"type": name}) == name for name in MEDIA_PART_TYPES)


def test_a_pil_subclass_and_an_unloaded_file(tmp_path) -> None:
    PIL.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert kinds(opened) == [("object", "image")]


@pytest.mark.parametrize(
    ("detail", "loading"),
    [
        ("low", {"max_pixels": 262_144}),
        ("high", {"max_pixels": 4_194_304}),
        ("auto", {}),
        ("original", {}),
        (None, {}),
    ],
)
def test_detail_bounds_the_pixels(detail: str | None, loading: dict[str, int]) -> None:
    inner = {"type": "image_url", "image_url": {"url": URL, "detail": detail}}
    outer = {"type": "input_image", "image_url": URL, "detail": detail}
    for part in (inner, outer):
        assert ref_from_part(part, PLACE).loading == loading


@pytest.mark.parametrize("detail", ["lowest", "", 1, {}])
def test_unknown_detail_is_refused_with_its_place(detail: object) -> None:
    inner = {"type": "image_url", "image_url": {"url": URL, "detail": detail}}
    with pytest.raises(InvalidRequestError, match="low, high, auto, original") as caught:
        ref_from_part(inner, PLACE)
    assert caught.value.param == f"{PLACE}.image_url.detail"
