"""The comparison with other engines: names, groups, memory, ratios, tables and charts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmarks import chart
from benchmarks.harness import Figures
from benchmarks.peers import tables
from benchmarks.peers.engines import FORMATS, LEVELS, EngineKind, engine_kind, in_groups
from benchmarks.peers.memory import MemoryWatch
from benchmarks.peers.ranking import beside_best, comparison_table, size_of
from benchmarks.processes import ProcessTree

from tests import checkpoints

ROOT = Path(__file__).parents[2]
GIB = 2**30


def kinds(*names: str, cpu: str = "native") -> list[EngineKind]:
    return [EngineKind(name, Path(sys.executable), cpu=cpu) for name in names]


def test_every_format_has_a_runner_and_a_size() -> None:
    for runner, formats in FORMATS.items():
        assert (ROOT / "benchmarks" / "peers" / f"run_{runner}.py").is_file()
        for kind in formats:
            assert size_of(f"{runner}-{kind}")


def test_an_engine_has_a_known_runner_and_format(tmp_path: Path) -> None:
    kind = engine_kind(f"llamacpp-q8_0={sys.executable}", tmp_path, "avx2")
    assert (kind.runner, kind.format, kind.size) == ("llamacpp", "q8_0", "8-bit")
    assert engine_kind("sensorium-int4", tmp_path, "native").python == Path(sys.executable)
    with pytest.raises(ValueError, match="none of sensorium-bf16"):
        engine_kind("llamacpp-int8", tmp_path, "native")
    with pytest.raises(ValueError, match=r"vllm-env.*prepare\.py"):
        engine_kind("vllm", tmp_path, "native")


def test_a_level_is_told_to_each_engine_and_native_to_none(tmp_path: Path) -> None:
    ours, torch, other = kinds(
        "sensorium-int8", "transformers-float32", "openvino-int8", cpu="avx2"
    )
    found = ours.environment(2, 1, tmp_path, given={})
    assert found["NUMBA_CPU_NAME"] == "haswell"
    assert found["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert torch.environment(2, 1, tmp_path, given={})["ATEN_CPU_CAPABILITY"] == "avx2"
    assert other.environment(2, 1, tmp_path, given={})["LD_PRELOAD"].endswith("openvino-avx2.so")
    (native,) = kinds("sensorium-int8")
    variables = {name for level in LEVELS.values() for each in level.values() for name in each}
    assert not variables & set(native.environment(2, 1, tmp_path, given={}))


def test_groups_hold_what_fits_in_the_order_given() -> None:
    engines = kinds("sensorium-bf16", "sensorium-int8", "llamacpp-f16", "openvino-int8")
    assert in_groups(engines, 4 * GIB, 100) == [engines]
    groups = in_groups(engines, 4 * GIB, 13)
    assert [engine for group in groups for engine in group] == engines
    assert [len(group) for group in groups] == [2, 2]
    assert in_groups(engines, 4 * GIB, 0.1) == [[engine] for engine in engines]


def test_memory_that_was_given_back_counts() -> None:
    code = """
import sys
block = bytearray(200_000_000)
print("held", flush=True); sys.stdin.readline()
del block
print("free", flush=True); sys.stdin.readline()
"""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    tree = ProcessTree([sys.executable, "-c", code], **streams)
    watch = MemoryWatch(tree.processes)
    assert tree.root.stdout is not None
    assert tree.root.stdin is not None
    assert tree.root.stdout.readline() == "held\n"
    assert watch.peaks().anonymous > 190_000_000
    print(file=tree.root.stdin, flush=True)
    assert tree.root.stdout.readline() == "free\n"
    peaks = watch.peaks()
    assert peaks.peak > 190_000_000
    assert peaks.anonymous > 190_000_000
    watch.stop()
    tree.end(tree.root.stdin.close, timeout=60, children_timeout=60)
    assert watch.peaks().peak == 0


def result() -> dict[str, Any]:
    """A result as ``compare.py`` writes it, with made-up values."""
    figures = Figures()
    for engine, speed, seconds in (
        ("sensorium-int8", (40.0, 60.0, 50.0), 10.0),
        ("sensorium-bf16", (20.0, 20.0, 20.0), 20.0),
        ("llamacpp-q8_0", (40.0, 40.0, 40.0), 30.0),
        ("openvino-int8", (30.0, 31.0, 32.0), 20.0),
        ("llamacpp-f16", (40.0, 40.0, 40.0), 21.0),
    ):
        for value in speed:
            figures.note("decode_b1", engine, value, "tok/s", "higher")
        figures.note("image_first", engine, seconds, "s", "lower")
    found = figures.summary("")
    for figure in found.values():
        figure["beside_best"] = beside_best(figure)
    machine = {
        "processor": "a processor",
        "num_cores": 2,
        "python": "3.11",
        "packages": {"torch": "2"},
    }
    return {
        "date": "2026-11-30T00:00:00",
        "file": "peers-avx2-2026-11-30.json",
        "machine": machine,
        "settings": {"cpu": "avx2", "num_threads": 2, "rounds": 3},
        "engines": {"sensorium-int8": "sensorium 1", "llamacpp-q8_0": "llama.cpp 2"},
        "checkpoints": {"qwen2-vl-2b": {"figures": found}},
    }


def test_ours_is_beside_the_best_of_its_size_and_of_all() -> None:
    figures = result()["checkpoints"]["qwen2-vl-2b"]["figures"]
    decode = figures["decode_b1"]["beside_best"]
    assert decode["sensorium-int8"]["of_its_size"] == {
        "engine": "llamacpp-q8_0",
        "ratio": 1.25,
        "range": [1.0, 1.5],
    }
    assert decode["sensorium-bf16"]["of_its_size"]["ratio"] == 0.5
    image = figures["image_first"]["beside_best"]["sensorium-int8"]
    assert image["of_its_size"]["engine"] == "openvino-int8"
    assert image["of_all"]["ratio"] == 0.5
    assert "of its size: 1.25 x llamacpp-q8_0 (1.00 to 1.50)" in comparison_table(figures)


def test_a_chart_has_a_bar_for_each_format_of_ours() -> None:
    root = ElementTree.fromstring(chart.draw(chart.formats_chart(result())))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "Qwen2-VL-2B: decode, 1 sequence, tok/s" in texts
    assert {"50.0 / 40.0 llamacpp-q8_0", "1.25×", "0.50×", "2.0×"} <= set(texts)


def test_tables_have_medians_and_how_many_times_as_good_ours_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(chart, "RESULTS", tmp_path)
    page = "before\n<!-- peers-avx2 -->\nold\n<!-- end of peers-avx2 -->\nafter\n"
    assert tables.NONE_YET in tables.filled(page)
    (tmp_path / "peers-avx2-2026-11-30.json").write_text(json.dumps(result()))
    text = tables.filled(page)
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| Sensorium int8 | **50.0** | **10.0** |" in text
    assert "| llama.cpp Q8_0 | 40.0 | 30.0 |" in text
    assert "| Sensorium int8 | 1.25 (1.00 to 1.50) | 2.00 |" in text
    assert tables.filled(text) == text


def test_the_page_shows_the_newest_results() -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- peers-{level} -->" in text for level in LEVELS)
    assert tables.filled(text) == text


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_ended(tmp_path: Path) -> None:
    """One round, then the same with two: nothing of the first is measured again."""
    model = checkpoints.make_text("qwen2", tmp_path / "model", max_position_embeddings=4096)

    def compare(rounds: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.peers.compare", "--resume", "--short"]
        command += [
            "--checkpoint",
            str(model),
            "--engine",
            "sensorium-float32",
            "--rounds",
            str(rounds),
        ]
        command += ["--start-rounds", "0", "--measure", "decode_b1_short", "--num-threads", "1"]
        command += ["--kv-cache-gib", "0.25", "--scratch", str(tmp_path / "scratch")]
        output = tmp_path / "peers.json"
        done = subprocess.run(
            [*command, "--output", str(output)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(output.read_text())["checkpoints"]["model"]
        assert found["failures"] == []
        return found["figures"]

    first, second = compare(1), compare(2)
    assert set(first) == {"start_cold", "decode_b1", "peak_memory", "peak_anonymous"}
    before = first["decode_b1"]["values"]["sensorium-float32"]
    after = second["decode_b1"]["values"]["sensorium-float32"]
    assert after[:1] == before
    assert len(after) == 2
    assert len(second["start_warm"]["values"]["sensorium-float32"]) == 1
