"""Files, PDFs and batches as a user meets them: a server, and the ``openai`` client."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.config import MediaConfig
from sensorium.multimodal.decode.document import render_page
from tests.e2e.serving import Server
from tests.fuzz.messages import leak_in
from tests.multimodal import pdfs
from tests.reliability.asking import image
from tests.reliability.listeners import host
from tests.reliability.media import encoded, picture

pytestmark = pytest.mark.slow

KEYS = ("key-of-ada", "key-of-ben")
FLAGS = ("--num-kv-blocks", "400", "--max-num-seqs", "8", "--num-media-workers", "2")
FLAGS += ("--max-document-pages", "6", "--max-file-bytes", "3000000")
FLAGS += ("--media-worker-memory-gb", "0.25")  # a file that grows reaches it soon
FLAGS += ("--allowed-media-domains", "localhost", "--image-fetch-timeout", "600")
QUESTION = {"type": "text", "text": "What is shown?"}
ENDED = ("completed", "failed", "expired", "cancelled")
PATIENCE = 120


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, stored: Path) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = (*FLAGS, "--api-key", *KEYS, "--file-folder", str(stored))
    server = Server("demo", log, flags)
    yield server
    assert list(stored.iterdir())
    assert server.stop() == 0
    assert not list(stored.iterdir())
    assert "Traceback" not in log.read_text()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        yield client


def document() -> bytes:
    return pdfs.of_images([picture(64, 48, seed) for seed in range(2)])


def pages(data: bytes, num: int = 2) -> list[dict[str, Any]]:
    """The pages of a PDF as parts of their own."""
    parts = []
    for index in range(num):
        buffer = io.BytesIO()
        Image.fromarray(render_page(data, index, MediaConfig())).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def ask(client: openai.OpenAI, *parts: Any) -> Any:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": [*parts, QUESTION]}],
        max_tokens=12,
        temperature=0,
        logprobs=True,
    )
    choice = answer.choices[0]
    return choice.message.content, choice.logprobs.content, answer.usage.prompt_tokens


def test_a_pdf_is_its_pages_however_it_comes(client: openai.OpenAI) -> None:
    data = document()
    wanted = ask(client, *pages(data))
    uploaded = client.files.create(file=("two.pdf", data), purpose="user_data")
    text = base64.b64encode(data).decode()
    ways: list[dict[str, Any]] = [
        {"type": "file", "file": {"file_id": uploaded.id}},
        {"type": "file", "file": {"file_data": text, "filename": "x.pdf"}},
        {"type": "input_file", "file_data": f"data:application/pdf;base64,{text}"},
        {"type": "input_image", "file_id": uploaded.id},
    ]
    for part in ways:
        assert ask(client, part) == wanted
    client.files.delete(uploaded.id)
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, ways[0])
    assert caught.value.param == "messages[0].content[0].file.file_id"


def test_the_text_of_a_page_follows_its_image(client: openai.OpenAI) -> None:
    data = pdfs.of_text("The <|im_end|> code is 1234.")
    text = base64.b64encode(data).decode()
    [image] = pages(data, 1)
    written = {
        "type": "text",
        "text": "Text of page 1 of a b.pdf:\nThe <|im_end|> code is 1234.",
    }
    file = {"type": "file", "file": {"file_data": text, "filename": "a\nb.pdf"}}
    assert ask(client, file) == ask(client, image, written)


def test_a_picture_in_a_file_is_a_picture(client: openai.OpenAI) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    as_image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
    as_file = {"type": "file", "file": {"file_data": text, "filename": "report.pdf"}}
    assert ask(client, as_file) == ask(client, as_image)


def test_the_same_pdf_is_drawn_once(client: openai.OpenAI, server: Server) -> None:
    data = pdfs.of_images([picture(64, 48, seed) for seed in (7, 8)])
    part = {"type": "file", "file": {"file_data": base64.b64encode(data).decode()}}

    def count() -> float:
        request = urllib.request.Request(
            f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEYS[0]}"}
        )
        with urllib.request.urlopen(request) as answer:
            text = answer.read().decode()
        name = r'^sensorium:media_stage_items_total{.*stage="decode"} (\S+)$'
        found = re.search(name, text, re.MULTILINE)
        assert found is not None, text
        return float(found[1])

    first = ask(client, part)
    before = count()
    assert ask(client, part) == first
    assert count() == before


@pytest.mark.parametrize("name", sorted(pdfs.hostile()))
def test_hostile_pdfs_are_answered_or_refused(client: openai.OpenAI, name: str) -> None:
    text = base64.b64encode(pdfs.hostile()[name]).decode()
    part = {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{text}"}}
    error = refusal(client, part)
    if error is not None:
        assert error.status_code in (400, 413)
        assert error.code in ("media_undecodable", "media_too_large", "invalid_request")
        assert error.param == "messages[0].content[0].file.file_data"
        assert not leak_in(error.body["message"])


def refusal(client: openai.OpenAI, part: Any) -> openai.APIStatusError | None:
    try:
        ask(client, part)
    except openai.APIStatusError as error:
        return error
    return None


def test_too_many_pages_are_told_with_numbers(client: openai.OpenAI) -> None:
    text = base64.b64encode(pdfs.plain(7)).decode()
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, {"type": "file", "file": {"file_data": text}})
    assert caught.value.status_code == 413
    assert caught.value.code == "media_too_large"
    assert "7 pages" in caught.value.body["message"]
    assert "6" in caught.value.body["message"]


def test_offline_a_path_below_the_allowed_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "two.pdf").write_bytes(document())
    (tmp_path / "out.pdf").write_bytes(document())
    params = SamplingParams(max_tokens=8, temperature=0)

    def talk(part: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [part, QUESTION]}]

    with LLM("demo", allowed_local_media_path=str(tmp_path / "in"), num_kv_blocks=400) as llm:
        talks = [
            talk({"type": "file", "file": str(tmp_path / "in" / "two.pdf")}),
            [{"role": "user", "content": [*pages(document()), QUESTION]}],
        ]
        first, second = llm.chat(talks, params, use_tqdm=False)
        assert first.outputs[0].text == second.outputs[0].text
        assert first.num_item_tokens == second.num_item_tokens
        for part, words in (
            ({"type": "file", "file": str(tmp_path / "out.pdf")}, "allowed"),
            ({"type": "file", "file": {"file_id": "file-1"}}, "uploaded"),
        ):
            with pytest.raises(ValueError, match=words):
                llm.chat(talk(part), params, use_tqdm=False)


# --- batches --------------------------------------------------------------------------------------


def lines(num: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "custom_id": f"line {i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "demo",
                "messages": [{"role": "user", "content": f"Say {i}"}],
                "max_tokens": 3,
                "temperature": 0,
            },
        }
        for i in range(first, first + num)
    ]


def text_of(entries: list[Any]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def begin(client: openai.OpenAI, entries: list[Any], **more: Any) -> Any:
    file = client.files.create(file=("in.jsonl", text_of(entries)), purpose="batch")
    given = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **more}
    return client.batches.create(input_file_id=file.id, **given)


def ended(client: openai.OpenAI, batch: Any) -> Any:
    deadline = time.monotonic() + PATIENCE
    while batch.status not in ENDED:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def read(client: openai.OpenAI, file_id: str | None) -> list[Any]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_a_batch_answers_each_line_once(client: openai.OpenAI) -> None:
    entries = lines(20)
    entries[4]["body"]["temperature"] = -1
    batch = ended(client, begin(client, entries, metadata={"for": "ada"}))
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (20, 19, 1)
    assert batch.metadata == {"for": "ada"}
    answers, errors = read(client, batch.output_file_id), read(client, batch.error_file_id)
    assert sorted(a["custom_id"] for a in answers + errors) == sorted(
        e["custom_id"] for e in entries
    )
    assert [e["custom_id"] for e in errors] == ["line 4"]
    assert errors[0]["response"]["status_code"] == 400
    assert errors[0]["response"]["body"]["error"]["param"] == "temperature"
    alone = client.chat.completions.create(**entries[7]["body"])
    [same] = [a for a in answers if a["custom_id"] == "line 7"]
    assert (
        same["response"]["body"]["choices"][0]["message"]["content"]
        == alone.choices[0].message.content
    )
    assert batch.id in [b.id for b in client.batches.list(limit=100)]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"method": "GET"}, "invalid_method", "method"),
        ({"url": "/v1/nothing"}, "invalid_url", "url"),
        ({"url": "/v1/completions"}, "mismatched_endpoint", "url"),
        ({"custom_id": None}, "missing_required_parameter", "custom_id"),
        ({"custom_id": "line 0"}, "duplicate_custom_id", "custom_id"),
        ({"body": []}, "missing_required_parameter", "body"),
        ({"body": {"stream": True}}, "invalid_request", "body.stream"),
    ],
)
def test_a_bad_line_fails_the_batch_before_any_runs(
    client: openai.OpenAI, change: dict[str, Any], code: str, param: str
) -> None:
    entries = lines(3)
    entries[2] |= change
    batch = ended(client, begin(client, entries))
    assert batch.status == "failed"
    [error] = batch.errors.data
    assert (error.code, error.param, error.line) == (code, param, 3)
    assert batch.output_file_id is None
    assert batch.request_counts.completed == 0


def test_a_batch_is_cancelled(client: openai.OpenAI) -> None:
    entries = lines(3000)
    batch = begin(client, entries)
    cancelled = client.batches.cancel(batch.id)
    assert cancelled.status in ("cancelling", "cancelled")
    batch = ended(client, cancelled)
    assert batch.status == "cancelled"
    assert batch.request_counts.completed < 3000
    assert len(read(client, batch.output_file_id)) == batch.request_counts.completed
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)


def test_batches_are_of_their_tenant(client: openai.OpenAI, server: Server) -> None:
    batch = ended(client, begin(client, lines(1)))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[1], max_retries=0) as other:
        for call in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                call(batch.id)
        assert not list(other.batches.list())
        with pytest.raises(openai.NotFoundError):
            other.files.content(batch.output_file_id)
        with pytest.raises(openai.NotFoundError) as caught:
            other.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
        assert caught.value.param == "input_file_id"


def test_interactive_requests_come_first(client: openai.OpenAI) -> None:
    batch = begin(client, lines(2000))
    while client.batches.retrieve(batch.id).request_counts.completed < 4:
        time.sleep(0.01)
    for _ in range(3):
        assert ask(client)[0] is not None
    assert client.batches.retrieve(batch.id).status == "in_progress"
    ended(client, client.batches.cancel(batch.id))


# --- sensorium batch ------------------------------------------------------------------------------


def command(server: Server, folder: Path, *more: str) -> list[str]:
    base = ["--base-url", server.url, "--api-key", KEYS[0], "--concurrency", "4"]
    files = [str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]
    return [sys.executable, "-m", "sensorium", "batch", *files, *base, *more]


def outputs(folder: Path) -> list[Any]:
    found = []
    for name in ("out.jsonl", "out.errors.jsonl"):
        path = folder / name
        if path.exists():
            found += [json.loads(line) for line in path.read_text().splitlines()]
    return found


@pytest.fixture
def late_picture() -> Iterator[tuple[str, threading.Event]]:
    """The URL of a picture, and what lets it come."""
    may_come, data = threading.Event(), encoded(picture())

    def send(connection: socket.socket) -> None:
        may_come.wait()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    with host() as running:
        yield running.act("/late.png", send), may_come
        may_come.set()


def test_a_killed_run_goes_on_with_each_line_once(
    server: Server, tmp_path: Path, late_picture: tuple[str, threading.Event]
) -> None:
    """Killed when it has written so much; a line that waits keeps it from ending before."""
    url, may_come = late_picture
    entries = lines(60)
    entries[0]["body"]["messages"][0]["content"] = [image(url), QUESTION]
    entries[10] |= {"method": "GET"}
    entries[20]["body"]["top_p"] = 7
    entries[30]["custom_id"] = "line 5"
    (tmp_path / "in.jsonl").write_bytes(text_of(entries))
    out = tmp_path / "out.jsonl"
    for num_bytes in (1, 6_000):
        process = subprocess.Popen(command(server, tmp_path), stderr=subprocess.PIPE)
        before = out.stat().st_size if out.exists() else 0
        while not out.exists() or out.stat().st_size < before + num_bytes:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
        with out.open("ab") as file:
            file.write(b'{"id":"batch_req_9')  # as a torn write leaves it
    may_come.set()
    done = subprocess.run(
        command(server, tmp_path, "--in-order"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    found = outputs(tmp_path)
    assert len(found) == 60
    assert len({entry["id"] for entry in found}) == 60
    ids = [int(e["id"].rpartition("_")[2]) for e in map(json.loads, out.read_text().splitlines())]
    assert ids == sorted(ids)
    errors = {e["id"].rpartition("_")[2]: e for e in found if e not in ids and _failed(e)}
    assert set(errors) == {"11", "21", "31"}
    assert errors["11"]["error"]["line"] == 11
    assert errors["21"]["response"]["status_code"] == 400
    assert errors["31"]["error"]["code"] == "duplicate_custom_id"
    assert "line 6" in errors["31"]["error"]["message"]
    again = subprocess.run(command(server, tmp_path), capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "57 of 60 lines answered" in again.stderr
    assert outputs(tmp_path) == found


def _failed(entry: dict[str, Any]) -> bool:
    return entry["response"] is None or entry["response"]["status_code"] != 200


def test_an_interrupt_ends_it_in_order(server: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(text_of(lines(5000)))
    process = subprocess.Popen(command(server, tmp_path), stderr=subprocess.PIPE, text=True)
    out = tmp_path / "out.jsonl"
    while not out.exists() or out.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "the same command goes on with them" in said
    assert "Traceback" not in said
    found = outputs(tmp_path)
    assert 0 < len(found) < 5000
    assert len({entry["id"] for entry in found}) == len(found)


def test_with_a_model_of_its_own(tmp_path: Path) -> None:
    entries = lines(4)
    (tmp_path / "two.pdf").write_bytes(document())
    content = [{"type": "file", "file": {"file_url": str(tmp_path / "two.pdf")}}, QUESTION]
    entries[3]["body"]["messages"][0]["content"] = content
    (tmp_path / "in.jsonl").write_bytes(text_of(entries))
    words = [sys.executable, "-m", "sensorium", "batch", str(tmp_path / "in.jsonl"), "-o"]
    words += [str(tmp_path / "out.jsonl"), "--model", "demo", "--num-kv-blocks", "400"]
    words += ["--in-order", "--allowed-local-media-path", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 lines answered" in done.stderr
    found = outputs(tmp_path)
    assert [e["custom_id"] for e in found] == [f"line {i}" for i in range(4)]
    assert found[3]["response"]["body"]["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    assert not (tmp_path / "out.errors.jsonl").exists()
