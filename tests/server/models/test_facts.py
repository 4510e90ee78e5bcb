"""Facts and memory of models, told by their files without loading them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sensorium
from sensorium.config import GIB, ParallelConfig, engine_config
from sensorium.errors import ConfigError
from sensorium.kernels import ops
from sensorium.kernels.cpu.linear import levels
from sensorium.models.gguf import folder as folders
from sensorium.models.gguf.reader import read
from sensorium.models.needs import PROCESSES, least_memory, needs_of
from sensorium.server.models.facts import read_facts
from tests import checkpoints
from tests.checkpoints.gguf import write_gguf
from tests.checkpoints.hf import make_hf_text
from tests.checkpoints.mmproj import write_mmproj

DEMO = Path(sensorium.__file__).parent / "demo"


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folders, "cache_root", lambda: tmp_path / "caches")
    folder = checkpoints.make_text("llama", tmp_path / "model")
    write_gguf(folder, tmp_path / "model-q8_0.gguf", "Q8_0")
    return tmp_path / "model-q8_0.gguf"


def test_what_the_demo_takes() -> None:
    facts = read_facts(engine_config(model="demo", limit_mm_per_prompt={"video": 0}))
    assert facts is not None
    assert (facts.runner, facts.modalities, facts.max_model_len) == ("generate", ("image",), None)
    pooling = read_facts(engine_config(model="demo", runner="pooling"))
    assert pooling is not None
    assert (pooling.runner, dict(pooling.sampling)) == ("pooling", {})
    assert {"image", "video"} <= set(pooling.modalities)


def test_a_model_that_is_not_here_has_no_facts(tmp_path: Path) -> None:
    assert read_facts(engine_config(model="somebody/something")) is None
    (tmp_path / "config.json").write_text("{}")
    assert read_facts(engine_config(model=str(tmp_path))) is None


def test_memory_follows_weights_context_and_format() -> None:
    weights = sum(file.stat().st_size for file in DEMO.glob("*.safetensors"))
    short, long, small = (
        least_memory(engine_config(model="demo", **options).model)
        for options in (
            {"max_model_len": 16},
            {"max_model_len": 1024},
            {"max_model_len": 16, "quantization": "int4"},
        )
    )
    assert weights < short - PROCESSES < weights + GIB // 100
    assert small < short < long


@pytest.mark.parametrize("quantization", [None, "none", "int4", "gguf"])
@pytest.mark.parametrize("integers", [True, False])
def test_what_a_gguf_file_takes_is_told_alike(
    gguf: Path, quantization: str | None, integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the estimate without torch, and by that of ``sensorium pull``."""
    monkeypatch.setattr(levels, "has_integer_products", lambda: integers)
    monkeypatch.setattr(ops, "has_integer_products", lambda: integers)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 16}
    config = engine_config(model=str(gguf), quantization=quantization, **options)
    needs = needs_of(config.model)
    assert abs(least_memory(config.model) - PROCESSES - needs.weights) <= needs.context
    assert (needs.weights < 2 * gguf.stat().st_size) == (
        (integers and quantization != "none") or quantization == "int4"
    )


def test_an_encoder_in_a_file_of_its_own_and_an_int8_cache_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "cache_root", lambda: tmp_path / "caches")
    source = checkpoints.make_qwen2_vl(tmp_path / "source")
    model, tower = tmp_path / "model.gguf", tmp_path / "tower.gguf"
    write_gguf(source, model)
    write_mmproj(source, tower)
    num_weights = sum(info.num_values for info in read(tower).tensors.values())
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 64}
    config = engine_config(model=str(model), mmproj=str(tower), **options).model
    alone = engine_config(model=str(model), **options).model
    assert least_memory(config) - least_memory(alone) == 4 * num_weights
    needs, small = needs_of(config), needs_of(config, "int8")
    assert needs.weights - needs_of(alone).weights == 4 * num_weights
    assert small.context < needs.context / 2
    saved = least_memory(config) - least_memory(config, "int8")
    assert saved == needs.context - small.context


def test_memory_of_a_model_that_ranks_share(tmp_path: Path) -> None:
    """Two ranks have a half each, but for the encoder; eight hold two heads of keys four times."""
    config = engine_config(model="demo", device="cpu", dtype="float32", max_model_len=64)
    alone = needs_of(config.model)
    needs, all_encode, eight = (
        needs_of(config.model, parallel=ParallelConfig(**options))
        for options in (
            {"tensor_parallel_size": 2},
            {"tensor_parallel_size": 2, "encoder_ranks": "all"},
            {"tensor_parallel_size": 8},
        )
    )
    encoder = 2 * needs.rank_weights - alone.weights
    assert 0 <= needs.weights - alone.weights < alone.weights / 100
    assert all_encode.weights - needs.weights == pytest.approx(encoder, rel=0.05)
    assert (needs.context, eight.context) == (alone.context, 4 * alone.context)
    assert needs.run - needs.weights - needs.context == needs.processes > PROCESSES
    assert eight.num_ranks == 8
    words = f"at most .* in each of {eight.num_ranks} processes"
    assert re.search(words, "\n".join(eight.lines()))
    early = [least_memory(config.model, num_ranks=size) for size in (1, 2, 8)]
    assert early[1] - early[0] == needs.processes - PROCESSES
    assert early[2] - early[0] == eight.processes - PROCESSES + 3 * alone.context
    with pytest.raises(ConfigError, match="cannot be divided so: use 2 or 4 or 8"):
        needs_of(config.model, parallel=ParallelConfig(tensor_parallel_size=3))
    checkpoint = make_hf_text("gpt2", tmp_path)
    with pytest.raises(ConfigError, match="cannot be divided here"):
        needs_of(
            engine_config(model=str(checkpoint)).model,
            parallel=ParallelConfig(tensor_parallel_size=2),
        )


def test_neither_imports_torch() -> None:
    """The server's process would be larger by hundreds of megabytes."""
    code = (
        "import sys\n"
        "from sensorium.config import engine_config\n"
        "from sensorium.kernels.cpu.linear import levels\n"
        "from sensorium.models.needs import least_memory\n"
        "from sensorium.server.models.facts import read_facts\n"
        "config = engine_config(model='demo')\n"
        "assert read_facts(config) is not None and least_memory(config.model) > 0\n"
        "levels.has_integer_products()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
