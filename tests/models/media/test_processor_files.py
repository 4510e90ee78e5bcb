"""Which file tells how media are prepared, when a folder has several.

What lies inside processor_config.json counts.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sensorium import LLM
from sensorium.models import loader
from sensorium.models.interface import warn_of_defaults
from sensorium.models.loading import checkpoint
from sensorium.models.registry import resolve
from tests.checkpoints import make_llava, make_qwen2_vl, make_text, make_ultravox
from tests.models.harness import image_processor, picture

OLD, NEW = 20 * 28 * 28, 4 * 28 * 28


def edit(path: Path, **values: Any) -> None:
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(old | values))


def with_most_pixels(folder: Path, most: int) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "preprocessor_config.json").read_text())
    settings.pop("size", None)
    return settings | {"min_pixels": 28 * 28, "max_pixels": most}


def num_embeds(folder: Path, height: int = 300, width: int = 400) -> int:
    loaded = loader.read_config(str(folder))
    processor = resolve(loaded.config).build_processor(loaded)
    assert processor is not None
    return processor.process("image", picture(height, width, 0), {}).num_embeds


def reference(folder: Path) -> int:
    """The same as transformers makes of the folder."""
    made = image_processor(folder)(
        picture(300, 400, 0), return_tensors="pt", input_data_format="channels_last"
    )
    return int(made["image_grid_thw"].prod()) // 4


def test_the_nested_image_processor_counts_over_an_older_file(tmp_path: Path) -> None:
    folder = make_qwen2_vl(tmp_path)
    old, new = with_most_pixels(folder, OLD), with_most_pixels(folder, NEW)
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    assert num_embeds(folder) == reference(folder) > 10
    edit(folder / "processor_config.json", image_processor=new)
    assert num_embeds(folder) == reference(folder) <= 4


@pytest.mark.parametrize("name", ["image_processor", "video_processor"])
def test_both_nested_ones_count(tmp_path: Path, name: str) -> None:
    folder = make_qwen2_vl(tmp_path)
    edit(folder / "preprocessor_config.json", **with_most_pixels(folder, OLD))
    edit(folder / "video_preprocessor_config.json", **with_most_pixels(folder, OLD))
    edit(folder / "processor_config.json", **{name: with_most_pixels(folder, NEW)})
    read = checkpoint.read(folder)
    new, old = (
        (read.preprocessor, read.video_preprocessor)
        if name == "image_processor"
        else (read.video_preprocessor, read.preprocessor)
    )
    assert (new["max_pixels"], old["max_pixels"]) == (NEW, OLD)


def test_videos_follow_the_nested_image_processor_where_nothing_speaks_of_them(
    tmp_path: Path,
) -> None:
    folder = make_qwen2_vl(tmp_path)
    edit(folder / "preprocessor_config.json", **with_most_pixels(folder, OLD))
    edit(folder / "processor_config.json", image_processor=with_most_pixels(folder, NEW))
    assert checkpoint.read(folder).video_preprocessor["max_pixels"] == NEW


@pytest.mark.parametrize("value", [None, "CLIPImageProcessor", []])
def test_a_nested_value_that_is_no_mapping_says_nothing(tmp_path: Path, value: Any) -> None:
    folder = make_llava(tmp_path)
    own = json.loads((folder / "preprocessor_config.json").read_text())
    edit(folder / "processor_config.json", image_processor=value)
    assert checkpoint.read(folder).preprocessor == own


def test_a_nested_feature_extractor_of_sounds(tmp_path: Path) -> None:
    folder = make_ultravox(tmp_path)
    edit(folder / "preprocessor_config.json", hop_length=80, n_fft=400)
    edit(folder / "processor_config.json", feature_extractor={"hop_length": 200, "n_fft": 400})
    loaded = loader.read_config(str(folder))
    processor: Any = resolve(loaded.config).build_processor(loaded)
    assert processor.mel.hop == 200


@pytest.mark.parametrize("make", [make_llava, make_qwen2_vl])
def test_one_warning_where_no_file_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Any
) -> None:
    folder = make(tmp_path)
    sizes = {"num_kv_blocks": 40, "block_size": 16, "max_model_len": 256}
    LLM(str(folder), **sizes).close()
    assert "prepared with the defaults" not in caplog.text
    (folder / "preprocessor_config.json").unlink()
    with caplog.at_level(logging.WARNING):
        LLM(str(folder), **sizes).close()
    [message] = [r.getMessage() for r in caplog.records if "defaults" in r.getMessage()]
    assert "preprocessor_config.json" in message


def test_no_warning_for_sounds_and_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ultravox is published without one: its audio is prepared as Whisper's."""
    make_text("llama", tmp_path / "text")
    make_ultravox(tmp_path / "sounds")
    (tmp_path / "sounds" / "preprocessor_config.json").unlink(missing_ok=True)
    for name in ("text", "sounds"):
        loaded = loader.read_config(str(tmp_path / name))
        warn_of_defaults(loaded, resolve(loaded.config))
    assert not caplog.records
