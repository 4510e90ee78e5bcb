"""``sensorium batch --replicas``: each good line once, though a process is killed meanwhile."""

from __future__ import annotations

import base64
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sensorium.cli.main import main
from tests.ray.processes import processes_of
from tests.ray.test_processor import conversation, png

NUM_LINES = 120
ENGINES = ["--model", "demo", "--max-num-seqs", "4", "--num-threads", "1"]


def line(number: int) -> dict[str, Any]:
    """A request; one of ten has a broken image, the last line repeats an id."""
    data = b"no image" if number % 10 == 3 else png(number)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    body = {"messages": conversation(url), "max_tokens": 12, "temperature": 0}
    custom_id = "line-7" if number == NUM_LINES else f"line-{number}"
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "demo", **body},
    }


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


class Killer(threading.Thread):
    """Kills one engine's worker when there are some outputs."""

    def __init__(self, output: Path, lines: int) -> None:
        super().__init__(daemon=True)
        self._output = output
        self._lines = lines
        self.given_up = threading.Event()
        self.killed: int | None = None

    def run(self) -> None:
        while not self.given_up.wait(0.02):
            if self._output.exists() and self._output.read_bytes().count(b"\n") > self._lines:
                for process in processes_of("Answering"):
                    self.killed = process.pid
                    process.kill()
                    return


def test_a_worker_is_killed_and_a_run_goes_on(
    ray_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output, errors = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "bad.jsonl"))
    texts = [json.dumps(line(number)) for number in range(1, NUM_LINES + 1)]
    source.write_text("\n".join([*texts[:50], "", *texts[50:]]) + "\n")  # one blank line
    done = [
        {"id": f"batch_req_{n}", "custom_id": f"line-{n}", "response": {"mine": n}, "error": None}
        for n in (2, 5)
    ]
    torn = '{"id":"batch_req_6","custom_id":"line'
    output.write_text("".join(f"{json.dumps(entry)}\n" for entry in done) + torn)
    killer = Killer(output, lines=len(done) + 5)
    killer.start()
    given = ["batch", str(source), "-o", str(output), "--errors", str(errors), "--in-order"]
    status = main([*given, *ENGINES, "--replicas", "2", "--media-replicas", "1"])
    killer.given_up.set()
    killer.join()
    assert killer.killed is not None
    assert status == 1  # some lines have failed
    shown = capsys.readouterr()
    assert "(raylet)" not in shown.out + shown.err

    answered, failed = entries(output), entries(errors)
    numbers = [int(entry["id"].rpartition("_")[2]) for entry in answered + failed]
    blank = 51
    assert Counter(numbers) == Counter(set(range(1, NUM_LINES + 2)) - {blank})
    assert numbers[: len(answered)] == sorted(numbers[: len(answered)])
    bad = {n for n in range(1, NUM_LINES) if n % 10 == 3}
    bad = {n + (n >= blank) for n in bad} | {NUM_LINES + 1}
    assert set(numbers[len(answered) :]) == bad
    by_number = dict(zip(numbers, answered + failed, strict=True))
    assert by_number[2]["response"] == {"mine": 2}
    assert by_number[NUM_LINES + 1]["error"]["code"] == "duplicate_custom_id"
    assert by_number[3]["response"]["body"]["error"]["code"] == "media_undecodable"
    assert by_number[1]["response"]["body"]["usage"]["completion_tokens"] > 0
    assert main([*given, *ENGINES, "--replicas", "2"]) == 1  # nothing is left to do


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ray-address", "auto"], "--ray-address needs --replicas"),
        (["--replicas", "0"], "replicas must be from 1"),
        (["--replicas", "2", "--base-url", "http://x"], "give one of them"),
        (["--replicas", "2", "--replica-gpus", "-1"], "replica-gpus must be from 0"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    assert main(["batch", str(source), "-o", str(tmp_path / "out.jsonl"), *flags]) == 2
    assert message in capsys.readouterr().err
