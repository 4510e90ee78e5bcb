"""Runs of ``sensorium batch``: the files that they may use, and what they show."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sensorium.cli.batch.run import Job, run_batch
from sensorium.cli.commands.batch import errors_place
from sensorium.cli.main import main
from sensorium.server.batches.calls import Caller, Reply


class Echo:
    """Answers each request."""

    async def call(self, url: str, body: bytes) -> Reply:
        await asyncio.sleep(0)
        return Reply(200, "r", b"{}")


@asynccontextmanager
async def echo() -> AsyncIterator[Caller]:
    yield Echo()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}
    path.write_text(json.dumps(line) + "\n")
    return path


def job(source: Path) -> Job:
    return Job(
        source=source,
        answers=source.with_name("out.jsonl"),
        errors=source.with_name("out.errors.jsonl"),
        num_at_once=2,
        max_line_bytes=1 << 20,
        patience=0,
        in_order=False,
        overwrite=False,
        rerun_changed=False,
    )


def test_without_progress_the_summary_alone_is_shown(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SENSORIUM_PROGRESS", "0")
    assert run_batch(job(source), echo()) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("1 of 1 lines answered")


@pytest.mark.parametrize(
    "files",
    [
        ("-o", "in.jsonl"),
        ("-o", "link.jsonl"),
        ("-o", "hard.jsonl"),
        ("-o", "out.jsonl", "--errors", "in.jsonl"),
        ("-o", "out.jsonl", "--errors", "link.jsonl"),
        ("-o", "out.jsonl", "--errors", "sub/../out.jsonl"),
    ],
    ids=range(6),
)
def test_the_input_is_not_overwritten(
    source: Path, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    (source.parent / "sub").mkdir()
    (source.parent / "link.jsonl").symlink_to(source)
    (source.parent / "hard.jsonl").hardlink_to(source)
    before = source.read_bytes()
    command = ["batch", "in.jsonl", *files, "--overwrite", "--base-url", "http://127.0.0.1:9"]
    assert main(command) == 2
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("run.jsonl", "run.errors.jsonl"),
        ("run.a", "run.a.errors.jsonl"),
        ("run.b.jsonl", "run.b.errors.jsonl"),
    ],
)
def test_each_output_has_its_errors(output: str, errors: str) -> None:
    assert errors_place(None, f"folder/{output}") == f"folder/{errors}"
