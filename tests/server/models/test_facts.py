"""Facts and memory of models, told by their files without loading them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import sensorium
from sensorium.config import GIB, engine_config
from sensorium.models.needs import PROCESSES, least_memory
from sensorium.server.models.facts import read_facts

DEMO = Path(sensorium.__file__).parent / "demo"


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


def test_neither_imports_torch() -> None:
    """The server's process would be larger by hundreds of megabytes."""
    code = (
        "import sys\n"
        "from sensorium.config import engine_config\n"
        "from sensorium.models.needs import least_memory\n"
        "from sensorium.server.models.facts import read_facts\n"
        "config = engine_config(model='demo')\n"
        "assert read_facts(config) is not None and least_memory(config.model) > 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
