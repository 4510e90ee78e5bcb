"""A request's way as operators see it.

Lines at ``--log-level debug`` and Chrome traces in ``--trace-dir``.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from PIL import Image

from sensorium import LLM, SamplingParams
from tests.e2e.serving import Server

LINE = re.compile(
    r"DEBUG sensorium\.tracing: (\S+?)-\d+ \+(\d+\.\d) ms (first token|\w+)(?: in (\d+\.\d) "
    r"ms)?(.*)"
)
SECRET = "zebra-crossing"
"""A word of the prompts: it may be in no line and in no trace."""


class Line(NamedTuple):
    """A station's line."""

    milliseconds: float
    name: str
    facts: dict[str, str]


class Seen(NamedTuple):
    """What a server has left: the lines and the events of each request, all in the order of
    writing.
    """

    lines: dict[str, list[Line]]
    events: dict[str, list[dict[str, Any]]]
    log: str
    traces: str


def seen(log: Path, folder: Path) -> Seen:
    """Read what a stopped server has left."""
    lines: dict[str, list[Line]] = defaultdict(list)
    for found in LINE.finditer(log.read_text()):
        request, milliseconds, name, _, facts = found.groups()
        pairs = dict(fact.split("=", 1) for fact in facts.split())
        lines[request].append(Line(float(milliseconds), name, pairs))
    events: dict[str, list[dict[str, Any]]] = defaultdict(list)
    texts = [path.read_text() for path in sorted(folder.glob("*"))]
    for event in (event for text in texts for event in json.loads(text)):
        if "id" in event:
            events[re.split(r"-\d+(?: |$)", event["id"])[0]].append(event)
    return Seen(lines, events, log.read_text(), "".join(texts))


def image_url() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def messages() -> list[Any]:
    content = [
        {"type": "image_url", "image_url": {"url": image_url()}},
        {"type": "text", "text": f"What is in the picture, a {SECRET}?"},
    ]
    return [{"role": "user", "content": content}]


def ask(client: openai.OpenAI, request_id: str, **fields: Any) -> Any:
    extra = {"request_id": request_id, **fields.pop("extra_body", {})}
    return client.chat.completions.create(
        model="demo", messages=messages(), extra_body=extra, **fields
    )


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Four requests to a server, whose flag for the log counts more than its variable.

    A chat, the same again, a stream, and a stream that the client leaves; and a wrong one.
    """
    folder = tmp_path_factory.mktemp("chat")
    flags = ("--log-level", "debug", "--trace-dir", str(folder / "traces"))
    endless = {"ignore_eos": True}
    server = Server("demo", folder / "log", flags, {"SENSORIUM_LOG_LEVEL": "error"})
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            ask(client, "whole", max_tokens=4, extra_body=endless)
            ask(client, "again", max_tokens=4)
            for _ in ask(client, "streamed", max_tokens=4, stream=True):
                pass
            with ask(client, "left", max_tokens=1500, stream=True, extra_body=endless) as stream:
                next(iter(stream))
            with pytest.raises(openai.BadRequestError):
                client.completions.create(
                    model="demo",
                    prompt=SECRET * 20_000,
                    extra_body={"request_id": "wrong"},
                )
    finally:
        assert server.stop() == 0
    return seen(server.log, folder / "traces")


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("embedding")
    flags = ("--log-level", "debug", "--trace-dir", str(folder / "traces"), "--runner", "pooling")
    server = Server("demo", folder / "log", flags)
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            client.embeddings.create(
                model="demo", input="a vector", extra_body={"request_id": "vector"}
            )
    finally:
        assert server.stop() == 0
    return seen(server.log, folder / "traces")


def names(lines: list[Line]) -> list[str]:
    return [line.name for line in lines]


BEGINNING = ["received", "rendered"]
MEDIA = ["fetched", "decoded", "processed"]
ENGINE = ["prepared", "submitted", "scheduled", "prefilled", "first token"]
ENCODING = ["prepared", "submitted", "scheduled", "encoded", "prefilled", "first token"]


@pytest.mark.parametrize(
    ("request_id", "expected"),
    [
        ("whole", [*BEGINNING, *MEDIA, *ENCODING, "finished"]),
        ("again", [*BEGINNING, "cached", *ENGINE, "finished"]),
        ("streamed", [*BEGINNING, "cached", *ENGINE, "finished"]),
        ("left", [*BEGINNING, "cached", *ENGINE, "aborted"]),
        ("wrong", ["received", "failed"]),
    ],
)
def test_the_stations_of_a_request_in_order(
    chat: Seen, request_id: str, expected: list[str]
) -> None:
    lines = chat.lines[request_id]
    assert names(lines) == expected
    times = [line.milliseconds for line in lines]
    assert times == sorted(times), "two processes have one clock"


def test_the_stations_of_a_vector(embedding: Seen) -> None:
    expected = [*BEGINNING, "prepared", "submitted", "scheduled", "prefilled", "finished"]
    assert names(embedding.lines["vector"]) == expected


def test_lines_have_sizes_and_places(chat: Seen) -> None:
    facts = {line.name: line.facts for line in chat.lines["whole"]}
    assert facts["fetched"]["item"].startswith("messages[0].content[0]")
    assert int(facts["fetched"]["bytes"]) > 50
    assert int(facts["prepared"]["tokens"]) > int(facts["rendered"]["tokens"])
    assert facts["scheduled"]["tokens"] == facts["prepared"]["tokens"]
    assert facts["finished"]["tokens"] == "4"
    again = {line.name: line.facts for line in chat.lines["again"]}
    assert int(again["scheduled"]["cached_tokens"]) > 0
    wrong = {line.name: line.facts for line in chat.lines["wrong"]}
    assert wrong["failed"] == {"code": "context_length_exceeded"}


def spans(events: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Begin and end of each span; fails where spans of a track do not nest."""
    found: dict[str, tuple[float, float]] = {}
    opened: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "b":
            opened[event["id"]].append(event)
        elif event["ph"] == "e":
            begun = opened[event["id"]].pop()
            assert begun["name"] == event["name"]
            assert begun["ts"] < event["ts"]
            found[event["name"]] = (begun["ts"], event["ts"])
    assert not any(opened.values())
    return found


def test_traces_have_the_spans(chat: Seen) -> None:
    found = spans(chat.events["whole"])
    phases = ["prepare", "queue", "prefill", "decode"]
    assert {"request", "rendered", *MEDIA, "encoded", *phases} <= found.keys()
    first, last = found["request"]
    assert all(first <= begin and end <= last for begin, end in found.values())
    for one, next_one in itertools.pairwise(phases):
        assert found[one][1] <= found[next_one][0]
    assert found["fetched"][1] <= found["decoded"][0] + 1
    left = spans(chat.events["left"])
    assert {"request", "prepare", "queue", "prefill"} <= left.keys()
    wrong = next(event for event in chat.events["wrong"] if event["name"] == "request")
    assert wrong["args"]["ended"] == "failed"


def test_spans_agree_with_lines(chat: Seen) -> None:
    begin, end = spans(chat.events["whole"])["request"]
    assert (end - begin) / 1000 == pytest.approx(chat.lines["whole"][-1].milliseconds, abs=0.2)


def test_a_trace_of_a_vector(embedding: Seen) -> None:
    assert {"request", "prepare", "queue", "prefill"} <= spans(embedding.events["vector"]).keys()


def test_neither_has_content(chat: Seen) -> None:
    assert SECRET not in chat.log
    assert SECRET not in chat.traces
    assert "base64" not in chat.traces


def test_offline_traces(tmp_path: Path) -> None:
    with LLM("demo", trace_dir=str(tmp_path / "new" / "traces")) as llm:
        llm.chat(messages(), SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        llm.generate(["one", "two"], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    (path,) = (tmp_path / "new" / "traces").iterdir()
    assert path.stat().st_mode & 0o077 == 0
    events: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in json.loads(path.read_text()):
        if "id" in event:
            events[event["id"].split(" ")[0]].append(event)
    assert list(events) == ["0", "1", "2"]
    assert {"request", *MEDIA, "prepare", "queue", "prefill", "decode"} <= spans(events["0"]).keys()
    assert {"request", "prepare", "queue", "prefill", "decode"} <= spans(events["2"]).keys()
