"""Inputs and outputs of ``sensorium batch`` in other formats and on other file systems."""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from sensorium.cli.batch.places import Wishes, lines_of, local_output
from sensorium.cli.batch.remote import RemoteCaller
from sensorium.cli.commands.batch import allow_folder, models_of
from sensorium.cli.main import build_parser
from sensorium.errors import ConfigError
from sensorium.server.batches.calls import Reply
from sensorium.server.batches.lines import BadLine, Line, read_lines, survey
from sensorium.server.batches.runner import answered
from sensorium.server.batches.urls import without_secrets


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def parsed(name: str, wishes: Wishes) -> list[Line | BadLine]:
    with lines_of(name, wishes) as found, found.path.open("rb") as file:
        facts = survey(file, 1 << 20, is_made=found.is_made)
        return list(read_lines(file, facts, 1 << 20))


def lines(name: str, wishes: Wishes | None = None) -> list[dict[str, Any]]:
    with lines_of(name, wishes or Wishes()) as found:
        return [json.loads(text) for text in found.path.read_text().splitlines()]


def test_a_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/2.PNG", "b/1.jpg", "a.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "notes.txt").write_text("no image")
    found = lines(str(tmp_path), Wishes("What is it?", {"max_tokens": 3}))
    assert [line["custom_id"] for line in found] == ["a.png", "b/1.jpg", "b/2.PNG"]
    assert found[0]["url"] == "/v1/chat/completions"
    assert found[0]["body"]["max_tokens"] == 3
    [message] = found[0]["body"]["messages"]
    url = (tmp_path / "a.png").as_uri()
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is it?"},
    ]
    inline = lines(str(tmp_path), Wishes("What is it?", inline=True))
    url = inline[0]["body"]["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == png()
    with pytest.raises(ConfigError, match="--prompt"):
        lines(str(tmp_path))


def test_images_that_cannot_be_sent_are_errors_of_their_rows(tmp_path: Path) -> None:
    folder, other = tmp_path / "in", tmp_path / "other"
    for made in (folder, other):
        made.mkdir()
        (made / "a.png").write_bytes(png())
    (folder / "b.png").symlink_to("a.png")
    (folder / "c.png").symlink_to(other / "a.png")
    (folder / "d").symlink_to(other)
    (folder / "e.png").symlink_to(folder / "nothing")
    os.mkfifo(folder / "f.png")
    (folder / "g.png").write_bytes(bytes(2000))
    refused = {"c.png": "leads out", "e.png": "cannot be read", "f.png": "not a regular file"}
    for inline in (False, True):
        wishes = Wishes("What?", inline=inline, most_image_bytes=1000)
        found = parsed(str(folder), wishes)
        bad = {one.custom_id: one for one in found if isinstance(one, BadLine)}
        large = {"g.png": "more than 1000 bytes"} if inline else {}
        assert set(bad) == {*refused, *large}
        for name, text in (refused | large).items():
            assert text in bad[name].message
            assert bad[name].code == ("media_refused" if name in refused else "media_too_large")
        assert {one.custom_id for one in found} == {f"{name}.png" for name in "abcefg"}


def test_an_image_that_has_changed_is_another_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png())
    before = [line.digest for line in parsed(str(tmp_path), Wishes("What?"))]
    assert before == [line.digest for line in parsed(str(tmp_path), Wishes("What?"))]
    (tmp_path / "b.png").write_bytes(png() + b" ")
    after = [line.digest for line in parsed(str(tmp_path), Wishes("What?"))]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]
    for wishes in (Wishes("Where?"), Wishes("What?", {"n": 2})):
        other = [line.digest for line in parsed(str(tmp_path), wishes)]
        assert not set(other) & set(after)


def test_an_image_is_the_same_line_however_it_travels(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b.png", "c.png"):
        (tmp_path / "a" / name).write_bytes(png())
    before = parsed(str(tmp_path / "a"), Wishes("What?"))
    (tmp_path / "a").rename(tmp_path / "moved")
    after = parsed(str(tmp_path / "moved"), Wishes("What?", inline=True))
    assert [line.digest for line in before] == [line.digest for line in after]
    assert [line.custom_id for line in before] == ["b.png", "c.png"]
    assert len({line.digest for line in before}) == 2


def test_an_image_that_cannot_be_read_is_an_error_of_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    opened = LocalFileSystem.open

    def failing(system: Any, path: str, *rest: Any) -> Any:
        if path.endswith("a.png"):
            raise OSError(errno.EIO, "Input/output error")
        return opened(system, path, *rest)

    monkeypatch.setattr(LocalFileSystem, "open", failing)
    bad, good = parsed(str(tmp_path), Wishes("What?", inline=True))
    assert isinstance(bad, BadLine)
    assert (bad.code, "Input/output error" in bad.message) == ("media_refused", True)
    assert isinstance(good, Line)


def test_a_connection_that_fails_is_no_error_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/down/a.png", png())

    def failing(*_: Any) -> Any:
        raise ConnectionResetError("reset")

    monkeypatch.setattr(type(memory), "open", failing)
    with pytest.raises(ConfigError, match="cannot be opened: reset"):
        lines("memory://down", Wishes("What?"))


def test_the_folder_may_be_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    given = ["batch", str(tmp_path / "in"), "-o", "out.jsonl", "--model", "demo"]
    arguments = build_parser().parse_args(given)
    arguments.listed_models = None
    allow_folder(arguments)
    [model] = models_of(arguments)
    assert model.engine.media.allowed_local_media_path == str(tmp_path / "in")
    arguments = build_parser().parse_args([*given, "--allowed-local-media-path", str(tmp_path)])
    arguments.listed_models = None
    allow_folder(arguments)
    assert models_of(arguments)[0].engine.media.allowed_local_media_path == str(tmp_path)


def test_tables(tmp_path: Path) -> None:
    def table(**columns: Any) -> str:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
        return str(tmp_path / "in.parquet")

    rows = lines(table(prompt=["a", "b"], max_tokens=[1, None], custom_id=["x", "y"]))
    assert rows == [
        {
            "custom_id": "x",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "a", "max_tokens": 1},
        },
        {"custom_id": "y", "method": "POST", "url": "/v1/completions", "body": {"prompt": "b"}},
    ]
    whole = lines(table(url=["/v1/embeddings"], body=['{"input": "a"}']), Wishes(body={"n": 1}))
    assert whole[0]["custom_id"] == "row-1"
    assert whole[0]["body"] == {"n": 1, "input": "a"}
    chat = [[{"role": "user", "content": "hi", "name": None}], [{"role": "user", "content": "ho"}]]
    assert lines(table(messages=chat))[0]["body"]["messages"] == [{"role": "user", "content": "hi"}]
    images = lines(table(image=[{"bytes": png(), "path": "x.png"}]), Wishes("what?"))
    assert images[0]["body"]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:")
    with pytest.raises(ConfigError, match="It has: other"):
        lines(table(other=[1]))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="cannot be opened"):
        lines(str(tmp_path / "bad.parquet"))


def test_rows_that_are_no_requests(tmp_path: Path) -> None:
    def found(wishes: Wishes | None = None, **columns: Any) -> list[Line | BadLine]:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
        return parsed(str(tmp_path / "in.parquet"), wishes or Wishes())

    bodies = ['{"input": "a"}', "no JSON", "[1]", None, '{"input": ', "7"]
    rows = found(url=["/v1/embeddings"] * len(bodies), body=bodies)
    assert [isinstance(row, BadLine) for row in rows] == [False, *[True] * 5]
    assert {row.code for row in rows if isinstance(row, BadLine)} == {"invalid_json_line"}
    assert [row.custom_id for row in rows] == [f"row-{n}" for n in range(1, 7)]
    assert isinstance(rows[1], BadLine)
    assert "Row 2 has a body that is not valid JSON" in rows[1].message
    images = found(Wishes("What?"), image=pyarrow.array([png(), None], pyarrow.binary()))
    assert [isinstance(row, BadLine) for row in images] == [False, True]


STRANGE: list[Any] = [
    {"choices": 5, "usage": "many", "data": {"a": 1}, "output": "x"},
    {"choices": [7], "usage": {"prompt_tokens": "5", "completion_tokens": 1 << 70}},
    {"choices": [{"message": "text"}], "data": [{"embedding": ["a", None]}]},
    {"choices": [{"message": {"content": [1]}}], "usage": {"prompt_tokens": 1.5}},
    {"data": [{"embedding": [True]}], "output": [{"content": [{"text": 5}, 3]}, None]},
]


def test_strange_answers_do_not_break_a_table(tmp_path: Path) -> None:
    """What another server answers is in the column body, whatever it is."""
    name = str(tmp_path / "out.parquet")
    line = Line(1, "a", "/v1/completions", b"{}")
    bodies = [json.dumps(body).encode() for body in STRANGE]
    with local_output(name, overwrite=False) as path, path.open("wb") as file:
        for body in bodies:
            outcome = answered(line, Reply(200, "r", body))
            assert outcome.succeeded
            file.write(outcome.text)
        for body in (b"<html>", b'["a"]', b"7", b"", b"\xff", b'{"a":' * 5000, b'{"a":"\xff"}'):
            outcome = answered(line, Reply(200, "r", body))
            assert not outcome.succeeded
            assert json.loads(outcome.text)["error"]["code"] == "bad_answer"
            file.write(outcome.text)
    rows = pyarrow.parquet.read_table(name).to_pylist()
    assert [row["body"].encode() for row in rows[: len(bodies)]] == bodies
    for row in rows:
        columns = ("text", "embedding", "prompt_tokens", "output_tokens")
        assert [row[column] for column in columns] == [None] * 4
        assert (row["line"], row["status_code"]) == (1, 200)


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    name = str(tmp_path / "in.parquet")
    times = pyarrow.array([1, 2], pyarrow.duration("ns"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "at": times}), name)
    assert len(parsed(name, Wishes())) == 2


def test_an_embedding_in_base64_is_no_empty_vector(tmp_path: Path) -> None:
    name = str(tmp_path / "out.parquet")
    body = {"data": [{"embedding": "AAAA"}]}
    entry = {"id": "a-1", "custom_id": "a", "response": {"status_code": 200, "body": body}}
    with local_output(name, overwrite=False) as path:
        path.write_text(json.dumps(entry) + "\n")
    assert pyarrow.parquet.read_table(name).to_pylist()[0]["embedding"] is None


def test_messages_about_folders_have_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://user:SECRETPW@host/folder/?sig=TOKEN123"
    system = type("System", (), {"isdir": lambda *_: True, "find": lambda *_: []})()
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda name: (system, name))
    with pytest.raises(ConfigError, match="no image below") as caught:
        lines(url, Wishes("What?"))
    assert "SECRETPW" not in str(caught.value)
    assert "TOKEN123" not in str(caught.value)

    def refuse(*_: Any) -> bool:
        raise LookupError(f"403, {url}")

    system.isdir = refuse
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        lines(url, Wishes("What?"))
    assert "SECRETPW" not in str(caught.value)
    assert "TOKEN123" not in str(caught.value)


def test_messages_have_no_secrets() -> None:
    urls = (
        "memory://user:hunter2@bucket/in.jsonl?X-Signature=hunter2",
        "nonsense://user:hunter2@bucket/in.parquet",
    )
    for url in urls:
        with pytest.raises(ConfigError) as found:
            lines(url)
        assert "hunter2" not in str(found.value)
        assert "in." in str(found.value)
    assert "hunter2" not in without_secrets("s3://me:hun/ter#hunter2@bucket/in.jsonl")
    assert "hunter2" not in without_secrets("http://a/b/?sig=hunter2")
    text = "GET https://me:hunter2@host/a?sig=hunter2 failed: sig=hunter2 at host"
    shown = without_secrets(text, "https://me:hunter2@host/a?sig=hunter2")
    assert shown == "GET https://***@host/a?*** failed: sig=*** at host"
    with pytest.raises(ConfigError, match=re.escape("ftp://***@host")):
        RemoteCaller("ftp://me:hunter2@host", api_key=None, timeout=1.0)


def output(number: int, text: str) -> str:
    choices = [{"message": {"content": text}}]
    body = {"choices": choices, "usage": {"prompt_tokens": 5, "completion_tokens": number}}
    response = {"status_code": 200, "request_id": "r", "body": body}
    entry = {"id": f"batch_req_{number}", "custom_id": f"c{number}", "response": response}
    return json.dumps(entry) + "\n"


def test_an_output_as_a_table(tmp_path: Path) -> None:
    name = str(tmp_path / "out.parquet")
    for number in (1, 2):  # a run that stops, and one that goes on
        with local_output(name, overwrite=False) as path, path.open("a") as file:
            file.write(output(number, f"text {number}"))
            if number == 2:
                file.write('{"id": "batch_req_3", "cus')  # cut off
    rows = pyarrow.parquet.read_table(name).to_pylist()
    assert [row["line"] for row in rows] == [1, 2]
    assert rows[1]["text"] == "text 2"
    assert (rows[1]["custom_id"], rows[1]["prompt_tokens"], rows[1]["output_tokens"]) == (
        "c2",
        5,
        2,
    )
    assert json.loads(rows[0]["body"])["choices"]


def test_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/in.jsonl", b'{"custom_id": "a"}\n')
    assert lines("memory://bucket/in.jsonl") == [{"custom_id": "a"}]
    memory.pipe("/bucket/images/a.png", png())
    [line] = lines("memory://bucket/images", Wishes("what?"))
    assert line["custom_id"] == "a.png"
    with pytest.raises(ConfigError, match="cannot be opened"):
        lines("memory://bucket/missing.jsonl")
    with pytest.raises(ConfigError, match="cannot be opened"):
        lines("nonsense://bucket/in.jsonl")

    with local_output("memory://bucket/out.jsonl", overwrite=False) as path:
        path.write_text(output(1, "one"))
    assert memory.cat_file("/bucket/out.jsonl").decode() == output(1, "one")
    path.unlink()  # as on another machine
    with local_output("memory://bucket/out.jsonl", overwrite=False) as path:
        assert path.read_text() == output(1, "one")
        with path.open("a") as file:
            file.write(output(2, "two"))
    assert memory.cat_file("/bucket/out.jsonl").count(b"\n") == 2
    with local_output("memory://bucket/out.parquet", overwrite=False) as path:
        path.write_text(output(1, "one"))
    file = memory.open("/bucket/out.parquet")
    assert pyarrow.parquet.read_table(file).to_pylist()[0]["text"] == "one"


def test_a_run_that_writes_nothing_leaves_what_was_delivered(tmp_path: Path) -> None:
    table, lines = tmp_path / "out.parquet", tmp_path / "out.parquet.jsonl"
    table.write_bytes(b"delivered")
    with pytest.raises(ConfigError, match="--overwrite"), local_output(str(table), overwrite=False):
        raise AssertionError("never run")
    lines.write_text('{"custom_id": "a"}\n')
    os.utime(lines, ns=(1, 1))
    with (
        contextlib.suppress(KeyboardInterrupt),
        local_output(str(table), overwrite=False) as path,
    ):
        assert path == lines
        raise KeyboardInterrupt
    assert table.read_bytes() == b"delivered"


def test_what_a_killed_run_has_not_delivered_comes_with_the_next(tmp_path: Path) -> None:
    table = tmp_path / "out.parquet"
    with local_output(str(table), overwrite=False) as path:
        path.write_text(output(1, "one"))
    os.utime(table, ns=(1, 1))
    path.write_text(output(1, "one") + output(2, "two"))  # killed
    with local_output(str(table), overwrite=False):
        pass  # nothing is left to do
    rows = pyarrow.parquet.read_table(table).to_pylist()
    assert [row["text"] for row in rows] == ["one", "two"]


def test_a_run_goes_on_from_what_another_machine_has_added() -> None:
    name, memory = "memory://both/answers.jsonl", fsspec.filesystem("memory")
    with local_output(name, overwrite=False) as path:
        path.write_text("one\n")
    memory.pipe_file("/both/answers.jsonl", b"one\ntwo\n")
    with local_output(name, overwrite=False) as path:
        assert path.read_text() == "one\ntwo\n"
    assert memory.cat_file("/both/answers.jsonl") == b"one\ntwo\n"
    with local_output(name, overwrite=False) as path:
        path.unlink()  # no line has failed
    assert not memory.exists("/both/answers.jsonl")


def test_answers_that_a_killed_run_has_taken_back_do_not_return() -> None:
    """What was delivered before is longer than what the run had got again when it was killed."""
    name, memory = "memory://taken/answers.jsonl", fsspec.filesystem("memory")
    with local_output(name, overwrite=False) as path:
        path.write_text("old\none\ntwo\n")
    path.write_text("one\ntwo\nnew")  # killed: not delivered
    with local_output(name, overwrite=False) as path:
        assert path.read_text() == "one\ntwo\nnew"
    assert memory.cat_file("/taken/answers.jsonl") == b"one\ntwo\nnew"
