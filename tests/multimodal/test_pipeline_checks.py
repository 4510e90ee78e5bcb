import pytest
import torch

from sensorium.config import MediaConfig
from sensorium.errors import (
    ConfigError,
    InvalidRequestError,
    MediaUndecodableError,
    TooManyItemsError,
    UnsupportedModalityError,
)
from sensorium.multimodal.cache.features import FeatureCache
from sensorium.multimodal.pipeline import MediaPipeline
from tests.multimodal.pipelines import embeds_ref, object_ref, url_ref
from tests.multimodal.support import (
    FakeProcessor,
    picture,
)

# -------------------


async def test_modalities_that_the_model_does_not_have(make) -> None:
    setup = make()
    for modality in ("video", "audio"):
        with pytest.raises(UnsupportedModalityError, match="it takes: image") as caught:
            await setup.load(url_ref("https://a.example/", param="here", modality=modality))
        assert caught.value.param == "here"
    text = FakeProcessor()
    text.modalities = ()
    pipeline = MediaPipeline(MediaConfig(), text, FeatureCache(0))
    with pytest.raises(UnsupportedModalityError, match="text only"):
        await pipeline.load([object_ref(picture())])
    pipeline.close()
    off = make(limit_mm_per_prompt={"image": 0})
    with pytest.raises(UnsupportedModalityError, match="switched off here by limit_mm_per_prompt"):
        await off.load(object_ref(picture()))


@pytest.mark.parametrize(("limit", "most"), [(2, 2), ({"count": 1}, 1), ({"num_frames": 3}, 256)])
async def test_items_are_counted(make, limit: object, most: int) -> None:
    setup = make(limit_mm_per_prompt={"image": limit})
    refs = [object_ref(picture(1, 1, i % 4), param=f"p{i}") for i in range(most + 1)]
    assert len(await setup.load(*refs[:most])) == most
    with pytest.raises(TooManyItemsError) as caught:
        await setup.load(*refs)
    assert caught.value.param == f"p{most}"
    assert f"{most + 1}" in caught.value.message
    assert "--" in caught.value.message


async def test_embeddings_must_be_enabled(make) -> None:
    setup = make()
    for source in (torch.zeros(2, 8), "not even base64"):
        with pytest.raises(InvalidRequestError, match="--enable-mm-embeds"):
            await setup.load(embeds_ref(source))


async def test_options_are_checked(make) -> None:
    setup = make()
    for options, param in (
        ({"mm_processor_kwargs": {"size": 3}}, "size"),
        ({"mm_processor_kwargs": [1]}, "mm_processor_kwargs"),
        ({"media_io_kwargs": "x"}, "media_io_kwargs"),
        ({"media_io_kwargs": {"imag": {}}}, "media_io_kwargs.imag"),
        ({"media_io_kwargs": {"video": {}}}, "media_io_kwargs.video"),
        ({"media_io_kwargs": {"image": None}}, "media_io_kwargs.image"),
        (
            {"media_io_kwargs": {"image": {"rgba_background_color": [1]}}},
            "media_io_kwargs.image.rgba_background_color",
        ),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            await setup.load(object_ref(picture()), **options)
        assert caught.value.param == param


@pytest.mark.parametrize(
    "config",
    [
        {"media_io_kwargs": {"image": {"rgba_background_color": [1]}}},
        {"media_io_kwargs": {"image": {"colour": [1, 2, 3]}}},
        {"media_io_kwargs": {"smell": {}}},
        {"mm_processor_kwargs": {"size": 3}},
        {"allowed_local_media_path": "/no/such/folder"},
        {"allowed_media_domains": ("http://a",)},
    ],
)
def test_wrong_configuration_fails_at_start(config: dict) -> None:
    with pytest.raises(ConfigError):
        MediaPipeline(MediaConfig(**config), FakeProcessor(), FeatureCache(0))


async def test_a_processor_that_breaks_costs_one_request(make, caplog) -> None:
    setup = make()
    setup.processor.error = ZeroDivisionError("at 0x7f00")
    with pytest.raises(MediaUndecodableError) as caught:
        await setup.load(object_ref(picture(), param="here"))
    assert caught.value.param == "here"
    assert "0x" not in caught.value.message
    assert "ZeroDivisionError" in caplog.text
    setup.processor.error = InvalidRequestError("aspect ratio")
    with pytest.raises(InvalidRequestError, match="aspect ratio") as caught:
        await setup.load(object_ref(picture(), param="here"))
    assert caught.value.param == "here"
    setup.processor.error = None
    assert len(await setup.load(object_ref(picture()))) == 1
