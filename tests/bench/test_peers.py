"""The comparison with other engines, on an engine that does nothing."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import tokenizers

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
RUNNER = """
import sys
sys.path.insert(0, {peers!r})
from worker import run, settings_of

class Engine:
    name = "fake 1"
    def complete(self, prompts, num_new):
        print("noise on stdout")
        return [num_new if num_new > 1 else {short}] * len(prompts)
    answer = complete

run(settings_of(), lambda settings: Engine())
"""


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The scripts of ``benchmarks/peers`` as modules."""
    monkeypatch.syspath_prepend(str(PEERS))
    names = ("workload", "measurements", "worker", "processes", "compare")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a tokenizer of one token per word, and a configuration with a vision tower."""
    words = sorted(set(importlib.import_module("sensorium.bench.workload").WORDS))
    source = (PEERS / "workload.py").read_text()
    words += [word.strip('"') for word in source.split() if word.strip('"').isalpha()]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(["?", *words]))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vision_config": {}}))
    return folder


class RecordingEngine:
    """Makes the tokens that it is asked for, and remembers what it saw."""

    name = "recording 1"

    def __init__(self) -> None:
        self.prompts: list[tuple[int, ...]] = []
        self.questions: list[tuple[bytes, str]] = []

    def complete(self, prompts: list[list[int]], num_new: int) -> list[int]:
        self.prompts += map(tuple, prompts)
        return [num_new] * len(prompts)

    def answer(self, questions: list[Any], num_new: int) -> list[int]:
        self.questions += [(q.picture.tobytes(), q.text) for q in questions]
        return [num_new] * len(questions)


def test_no_prompt_comes_twice(modules: dict[str, ModuleType], checkpoint: Path) -> None:
    engine = RecordingEngine()
    workload = modules["workload"].Workload(checkpoint)
    measurements = modules["measurements"]
    measurements.first_token(engine, workload)
    measurements.warm_up(engine, workload, pictures=True)
    for round_ in range(2):
        for name, measure in measurements.TEXT_MEASUREMENTS.items():
            figures = list(measure(engine, workload, round_))
            assert [figure.unit for figure in figures] == ["tok/s"], name
        for measure in measurements.PICTURE_MEASUREMENTS.values():
            assert all(figure.value > 0 for figure in measure(engine, workload, round_))
    assert len(set(engine.prompts)) == len(engine.prompts) == 1 + 42 + 2 * (3 * 41 + 1)
    assert {len(prompt) for prompt in engine.prompts} == {32, 2048}
    # One picture comes three times in a round, twice with the same text; the others once.
    assert len(engine.questions) == 1 + 2 * (3 + 8)
    assert len(set(engine.questions)) == len(engine.questions) - 2
    assert len({picture for picture, _ in engine.questions}) == len(engine.questions) - 4


def test_an_engine_that_makes_too_few_tokens_is_found_out(
    modules: dict[str, ModuleType], checkpoint: Path
) -> None:
    class LazyEngine(RecordingEngine):
        def complete(self, prompts: list[list[int]], num_new: int) -> list[int]:
            return [num_new - 1] * len(prompts)

    workload = modules["workload"].Workload(checkpoint)
    with pytest.raises(RuntimeError, match="asked for 1 times 1 tokens"):
        modules["measurements"].first_token(LazyEngine(), workload)


def start(modules: dict[str, ModuleType], checkpoint: Path, folder: Path, short: int) -> Any:
    (folder / "run_fake.py").write_text(RUNNER.format(peers=str(PEERS), short=short))
    processes = modules["processes"]
    processes.HERE = folder
    kind = processes.EngineKind("fake", Path(sys.executable))
    environment = kind.environment(1, 1, folder)
    return processes.EngineProcess(kind, [str(checkpoint)], environment, folder / "fake.log")


def test_a_process_measures_is_frozen_and_ends(
    modules: dict[str, ModuleType], checkpoint: Path, tmp_path: Path
) -> None:
    engine = start(modules, checkpoint, tmp_path, short=1)
    try:
        assert engine.version == "fake 1"
        assert engine.start_seconds > 0
        (process,) = [
            p for p in psutil.Process().children() if "run_fake.py" in " ".join(p.cmdline())
        ]
        engine.freeze()
        while process.status() != psutil.STATUS_STOPPED:
            pass
        engine.thaw()
        names = {f["name"] for f in engine.ask(do="measure", name="image", round=0)}
        assert names == {"image_first", "image_repeat_same_text", "image_repeat_other_text"}
        with pytest.raises(modules["processes"].EngineFailure, match="KeyError"):
            engine.ask(do="measure", name="nothing", round=0)
        assert engine.ask(do="measure", name="prefill", round=0)[0]["unit"] == "tok/s"
        engine.freeze()
    finally:
        engine.close()
    assert not process.is_running()


def test_a_process_that_ends_is_noticed(
    modules: dict[str, ModuleType], checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(modules["processes"].EngineFailure, match="ended"):
        start(modules, checkpoint, tmp_path, short=0)


def test_ratios_are_ours_over_theirs(modules: dict[str, ModuleType]) -> None:
    series = modules["compare"].Series("s", "lower")
    series.values = {"sensorium": [3.0, 1.0, 2.0], "vllm": [8.0]}
    summary = series.summary()
    assert summary["median"] == {"sensorium": 2.0, "vllm": 8.0}
    assert summary["ours_over"] == {"vllm": 0.25}
    table = modules["compare"].table({"start_warm": summary}, ["sensorium", "vllm"])
    assert "0.250" in table.splitlines()[1]


def test_every_checkpoint_has_a_template_and_real_ids(modules: dict[str, ModuleType]) -> None:
    checkpoints = importlib.import_module("checkpoints")
    assert checkpoints.SHAPES["qwen2-0.5b"].text_config()["hidden_size"] == 896
    special = [*checkpoints.SPECIAL.values(), *checkpoints.VISION_SPECIAL.values()]
    assert len(set(special)) == len(special)
    assert max(special) < checkpoints.SHAPES["qwen2-vl-2b"].vocab_size
