from __future__ import annotations

from pathlib import Path

import pytest

from sensorium.bench import latency, report, throughput
from sensorium.errors import ConfigError
from sensorium.outputs import CompletionOutput, RequestMetrics, RequestOutput


def output(num_prompt: int, num_new: int, first_token_time: float | None) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=[0] * num_prompt,
        outputs=[CompletionOutput(0, "", [1] * num_new, finish_reason="length")],
        finished=True,
        num_cached_tokens=1,
        metrics=RequestMetrics(10.0, first_token_time=first_token_time),
    )


def test_rates_of_a_batch() -> None:
    found = throughput.rates([output(30, 5, 11.0), output(50, 15, 11.0)], 4.0)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (80, 20)
    assert found["cached_tokens"] == 2
    assert found["requests_per_second"] == 0.5
    assert found["input_tokens_per_second"] == 20.0
    assert found["output_tokens_per_second"] == 5.0
    assert found["total_tokens_per_second"] == 25.0


def test_latency_of_a_batch() -> None:
    outputs = [output(40, 11, 100.5), output(40, 11, 102.0)]
    found = latency.figures(outputs, start=100.0, seconds=7.0)
    assert found["ttft_seconds"] == 2.0, "of the sequence that came last"
    assert found["prefill_tokens_per_second"] == 40.0
    assert found["step_seconds"] == pytest.approx(0.5)
    assert found["decode_tokens_per_second"] == pytest.approx(4.0)
    assert found["e2e_seconds"] == 7.0


def test_one_token_has_no_steps() -> None:
    found = latency.figures([output(40, 1, 100.5)], start=100.0, seconds=1.0)
    assert "step_seconds" not in found
    with pytest.raises(RuntimeError, match="no time of its first token"):
        latency.figures([output(40, 1, None)], start=100.0, seconds=1.0)


def test_results_name_no_path_of_this_machine(tmp_path: Path) -> None:
    keywords = {"model": str(tmp_path), "dtype": "bfloat16", "num_threads": 2}
    assert report.plain(keywords) == {**keywords, "model": tmp_path.name}
    assert str(Path.home()) not in str(report.header("latency", report.plain(keywords)))


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        report.write_json({}, tmp_path / "file" / "results.json")
    report.write_json({"a": 1}, tmp_path / "new" / "results.json")
    assert (tmp_path / "new" / "results.json").read_text() == '{\n  "a": 1\n}\n'
