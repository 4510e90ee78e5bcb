"""Measurements that are kept beside the compiled kernels."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sensorium.kernels.cpu import findings
from sensorium.kernels.cpu.linear import onednn


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(findings, "cache_folder", lambda: tmp_path)
    findings.known.cache_clear()
    yield tmp_path
    findings.known.cache_clear()


def always() -> bool:
    return True


def never_measured() -> int:
    raise AssertionError("it is known")


def test_a_number_is_measured_once_per_machine(folder: Path) -> None:
    assert findings.find("a", lambda: 4, keep=always) == 4
    findings.known.cache_clear()  # as in another process
    assert findings.find("a", never_measured, keep=always) == 4
    assert findings.find("b", lambda: 1, keep=always) == 1


def test_what_is_not_to_be_kept_is_measured_again(folder: Path) -> None:
    assert findings.find("a", lambda: 1, keep=lambda: False) == 1
    assert findings.find("a", lambda: 4, keep=always) == 4


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"])
def test_another_code_of_the_library_is_another_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    findings.find("a", lambda: 4, keep=always)
    monkeypatch.setenv(variable, "avx2")
    assert findings.find("a", lambda: 1, keep=always) == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": "b", "c": null}', "[" * 100_000])
def test_a_damaged_file_counts_as_empty(folder: Path, text: str) -> None:
    (folder / findings.FILE).write_text(text)
    assert findings.find("a", lambda: 8, keep=always) == 8
    findings.known.cache_clear()
    assert findings.find("a", never_measured, keep=always) == 8


def test_a_folder_that_is_gone_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings.known.cache_clear()
    monkeypatch.setattr(findings, "cache_folder", lambda: tmp_path / "gone")
    assert findings.find("a", lambda: 8, keep=always) == 8
    monkeypatch.setattr(findings, "cache_folder", lambda: None)
    assert findings.find("b", lambda: 8, keep=always) == 8
    findings.known.cache_clear()


def test_those_of_other_processes_stay(folder: Path) -> None:
    findings.find("a", lambda: 1, keep=always)
    file = folder / findings.FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "theirs": 3}))
    findings.find("b", lambda: 2, keep=always)
    assert sorted(json.loads(file.read_text()).values()) == [1, 2, 3]


def test_many_writers_leave_a_whole_file(folder: Path) -> None:
    def write(number: int) -> None:
        for index in range(20):
            findings.find(f"{number} {index}", functools.partial(int, index), keep=always)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in folder.iterdir()] == [findings.FILE]
    # One may miss what another has just written: it is measured again then.
    assert len(json.loads((folder / findings.FILE).read_text())) >= 20


def test_weights_of_zeros_leave_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of zeros are the same in any order: what they show must not count for other weights."""
    monkeypatch.setattr(onednn, "FOUND", {})
    onednn.pack_weight(torch.zeros(48, 96))
    assert not (folder / findings.FILE).exists()
    monkeypatch.setattr(onednn, "FOUND", {})
    onednn.pack_weight(torch.randn(48, 96))
    assert len(json.loads((folder / findings.FILE).read_text())) == 1
