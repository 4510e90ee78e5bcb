"""The files of a batch: each line once, whatever an interruption has left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.cli.batch.journal import Journal
from sensorium.errors import ConfigError
from sensorium.server.batches.lines import BadLine, Survey, digest_of, read_lines, survey
from sensorium.server.batches.runner import refused

MOST = 1 << 20


def output(number: int, custom_id: str | None) -> bytes:
    return refused(BadLine(number, custom_id, "code", "A message.")).text


@pytest.fixture
def found(tmp_path: Path) -> Survey:
    return surveyed(tmp_path, 10)


def surveyed(folder: Path, num: int) -> Survey:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"custom_id": f"id {i + 1}"}) + "\n" for i in range(num)))
    with path.open("rb") as file:
        return survey(file, MOST)


def opened(
    folder: Path, found: Survey, *, overwrite: bool = False, rerun_changed: bool = False
) -> Journal:
    options = {"overwrite": overwrite, "rerun_changed": rerun_changed}
    return Journal(folder / "out", folder / "err", found, **options)


def test_what_was_written_is_done_in_the_next_run(tmp_path: Path, found: Survey) -> None:
    with opened(tmp_path, found) as journal:
        journal.write(3, True, output(3, "id 3"))
        journal.write(1, False, output(1, "id 1"))
    with opened(tmp_path, found) as journal:
        assert (journal.num_done, journal.num_failed) == (2, 1)
        assert [n for n in range(1, 11) if journal.is_done(n)] == [1, 3]


def test_a_file_without_errors_goes(tmp_path: Path, found: Survey) -> None:
    with opened(tmp_path, found) as journal:
        journal.write(3, True, output(3, "id 3"))
    assert (tmp_path / "out").exists()
    assert not (tmp_path / "err").exists()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_line_that_was_cut_off_is_written_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    found = surveyed(folder, 10)
    with opened(folder, found) as journal:
        for number in range(1, 7):
            journal.write(number, True, output(number, f"id {number}"))
    whole = (folder / "out").read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    padding = data.draw(st.sampled_from((0, 0, 512)))
    (folder / "out").write_bytes(whole[:cut] + bytes(padding))
    with opened(folder, found) as journal:
        assert journal.num_done == whole[:cut].count(b"\n")
        for number in range(1, 11):
            if not journal.is_done(number):
                journal.write(number, True, output(number, f"id {number}"))
    ids = [json.loads(line)["id"] for line in (folder / "out").read_text().splitlines()]
    assert sorted(ids) == sorted(f"batch_req_{i}" for i in range(1, 11))


@pytest.mark.parametrize(
    "content",
    [
        b"notes of somebody\n",
        b"notes of somebody",
        b'{"id": "batch_req_1", "custom_id": "another"}\n',
        b'{"id": "batch_req_11", "custom_id": "id 11"}\n',
        b'{"id": "batch_req_x", "custom_id": "id 1"}\n',
        output(1, "id 1") * 2,
        output(1, "id 1") + b"\n" + output(2, "id 2"),
    ],
    ids=range(7),
)
def test_files_of_others_are_left_alone(tmp_path: Path, found: Survey, content: bytes) -> None:
    (tmp_path / "out").write_bytes(content)
    with pytest.raises(ConfigError, match="--overwrite"):
        opened(tmp_path, found)
    assert (tmp_path / "out").read_bytes() == content
    with opened(tmp_path, found, overwrite=True) as journal:
        assert journal.num_done == 0
    assert (tmp_path / "out").read_bytes() == b""


def test_two_runs_cannot_write_the_same_files(tmp_path: Path, found: Survey) -> None:
    with opened(tmp_path, found), pytest.raises(ConfigError, match="another run"):
        opened(tmp_path, found)


def test_nothing_is_forgotten_while_another_run_has_a_file(tmp_path: Path, found: Survey) -> None:
    with opened(tmp_path, found) as journal:
        journal.write(3, True, output(3, "id 3"))
    with (
        Journal(tmp_path / "other", tmp_path / "err", found, overwrite=False, rerun_changed=False),
        pytest.raises(ConfigError, match="another run"),
    ):
        opened(tmp_path, found, overwrite=True)
    assert (tmp_path / "out").read_bytes() == output(3, "id 3")


def test_sorting(tmp_path: Path, found: Survey) -> None:
    with opened(tmp_path, found) as journal:
        for number in (5, 2, 9, 1):
            journal.write(number, number != 9, output(number, f"id {number}"))
        journal.sort()
    lines = (tmp_path / "out").read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == ["id 1", "id 2", "id 5"]
    with opened(tmp_path, found) as journal:
        assert (journal.num_done, journal.num_failed) == (4, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["err", "in.jsonl", "out"]


def test_a_folder_that_is_not_there(tmp_path: Path, found: Survey) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        opened(tmp_path / "nowhere", found)


def answer(folder: Path, number: int) -> bytes:
    """The output of a line of the input as it is now."""
    raw = (folder / "in.jsonl").read_bytes().splitlines()[number - 1]
    return refused(BadLine(number, f"id {number}", "c", "A message.", None, digest_of(raw))).text


def test_a_line_that_was_too_long_runs_once_it_is_shorter(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"custom_id": "x" * 300}) + "\n")
    with path.open("rb") as file:
        found = survey(file, 100)
        [line] = read_lines(file, found, 100)
    assert isinstance(line, BadLine)
    with opened(tmp_path, found) as journal:
        journal.write(1, False, refused(line).text)
    with opened(tmp_path, found) as journal:
        assert journal.is_done(1)
    path.write_text(json.dumps({"custom_id": "x"}) + "\n")
    with path.open("rb") as file:
        shorter = survey(file, 100)
    with pytest.raises(ConfigError, match="--rerun-changed"):
        opened(tmp_path, shorter)
    with opened(tmp_path, shorter, rerun_changed=True) as journal:
        assert not journal.is_done(1)


def test_lines_that_have_changed_are_not_done(tmp_path: Path, found: Survey) -> None:
    with opened(tmp_path, found) as journal:
        journal.write(2, True, output(2, "id 2"))  # of a version without digests
        for number in (1, 4, 3, 5):
            journal.write(number, number != 3, answer(tmp_path, number))
    path = tmp_path / "in.jsonl"
    texts = path.read_text().splitlines()
    for number in (2, 3, 4):
        texts[number - 1] = texts[number - 1].replace("}", ', "body": {}}')
    path.write_text("\n".join(texts))
    with path.open("rb") as file:
        changed = survey(file, MOST)
    before = (tmp_path / "out").read_bytes()
    with pytest.raises(ConfigError, match=r"2 lines .* line 3 first.*--rerun-changed"):
        opened(tmp_path, changed)
    assert (tmp_path / "out").read_bytes() == before
    with opened(tmp_path, changed, rerun_changed=True) as journal:
        assert [n for n in range(1, 11) if journal.is_done(n)] == [1, 2, 5]
        assert (journal.num_done, journal.num_failed) == (3, 0)
        with pytest.raises(ConfigError, match="another run"):
            opened(tmp_path, changed)
        journal.write(4, True, answer(tmp_path, 4))
    with opened(tmp_path, changed) as journal:
        assert [n for n in range(1, 11) if journal.is_done(n)] == [1, 2, 4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out"]
