"""Each message of the page on troubleshooting is provoked, and is what is really printed.

A message that got better English goes into the page, too: the failing test shows it.
"""

from __future__ import annotations

import http.server
import json
import multiprocessing
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.errors import SensoriumError
from tests.checkpoints import make_qwen2_vl
from tests.docs.pages import text_of
from tests.e2e.serving import Server

SECTION = re.compile(r"^### (.+?)\n\n```output\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
MESSAGES = dict(SECTION.findall(text_of("docs/troubleshooting.md")))
PROVOCATIONS: dict[str, Callable[..., str]] = {}
"""What leads to each message, by the heading in the page."""
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
SHORT = SamplingParams(max_tokens=4)
KEY = "secret"


def provokes(heading: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register what leads to the message under ``heading``."""

    def register(provocation: Callable[..., str]) -> Callable[..., str]:
        PROVOCATIONS[heading] = provocation
        return provocation

    return register


def message_of(call: Callable[[], object]) -> str:
    """Return the message of the error that a call raises."""
    with pytest.raises(SensoriumError) as raised:
        call()
    return raised.value.message


def printed_by(*command: str) -> str:
    """Return what a command that fails prints as its error."""
    words = [sys.executable, "-m", "sensorium", *command]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode
    _, error, message = ended.stderr.partition("error: ")
    return error + message.strip()


def red() -> Image.Image:
    return Image.new("RGB", (64, 64), "red")


def conversation(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is shown?"}]}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(model="demo", limit_mm_per_prompt={"image": 2}, max_image_pixels=100_000) as made:
        yield made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--api-key", KEY, "--max-num-waiting", "4", "--max-num-seqs", "1")
    flags += ("--max-body-bytes", "100000")
    made = Server("demo", tmp_path_factory.mktemp("server") / "log", flags)
    yield made
    made.stop()


def ask(server: Server, *, key: str = KEY, **fields: Any) -> HTTPResponse:
    """Send a request to the server."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], **fields}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    return urllib.request.urlopen(request)


def refusal(server: Server, **fields: Any) -> str:
    """Return the message with which the server refuses a request."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        ask(server, **fields)
    return str(json.load(raised.value)["error"]["message"])


@provokes("An option is misspelt")
def misspelt() -> str:
    return message_of(lambda: LLM(model="demo", max_model_length=512))


@provokes("A flag is misspelt")
def misspelt_flag() -> str:
    return printed_by("serve", "demo", "--max-model-length", "512")


@provokes("The port is in use")
def port_in_use() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        return printed_by("serve", "demo", "--port", port).replace(port, "8000")


@provokes("The model's folder is not there")
def no_folder() -> str:
    return message_of(lambda: LLM(model="./no-such-folder"))


@provokes("The hub cannot be reached")
def no_hub(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return printed_by("serve", "some-org/some-model", "--port", "0")


def changed(folder: Path, **values: Any) -> str:
    """Return a checkpoint with other values in config.json."""
    make_qwen2_vl(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return str(folder)


@provokes("The architecture is not supported")
def architecture(tmp_path: Path) -> str:
    names = {"architectures": ["Qwen2VLForConditionalGeneratoin"], "model_type": "qwen2_vll"}
    folder = changed(tmp_path / "model", **names)
    return message_of(lambda: LLM(model=folder))


@provokes("The checkpoint is quantized")
def quantized(tmp_path: Path) -> str:
    folder = changed(tmp_path / "model", quantization_config={"quant_method": "hqq", "nbits": 4})
    return message_of(lambda: LLM(model=folder))


@provokes("The weights are pickle files")
def pickled(tmp_path: Path) -> str:
    folder = make_qwen2_vl(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return message_of(lambda: LLM(model=str(folder)))


@provokes("max_model_len is too large")
def context() -> str:
    return message_of(lambda: LLM(model="demo", max_model_len=100_000))


@provokes("There is no GPU")
def no_gpu() -> str:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    return message_of(lambda: LLM(model="demo", device="cuda"))


@provokes("The KV cache has no room")
def no_room() -> str:
    return message_of(lambda: LLM(model="demo", kv_cache_memory_bytes=1000))


@provokes("The prompt is too long")
def too_long(llm: LLM) -> str:
    return message_of(lambda: llm.generate("word " * 5000, SHORT))


@provokes("The prompt has no placeholder")
def no_placeholder(llm: LLM) -> str:
    prompt = {"prompt": "What is shown?", "multi_modal_data": {"image": red()}}
    return message_of(lambda: llm.generate(prompt, SHORT))


@provokes("The model does not take the modality")
def modality(llm: LLM) -> str:
    part = {"type": "audio_url", "audio_url": "https://example.com/speech.wav"}
    return message_of(lambda: llm.chat(conversation(part), SHORT))


@provokes("There are too many items")
def too_many(llm: LLM) -> str:
    parts = [{"type": "image_pil", "image_pil": red()}] * 3
    return message_of(lambda: llm.chat(conversation(*parts), SHORT))


@provokes("The type of a part is unknown")
def unknown_type(llm: LLM) -> str:
    part = {"type": "image", "image": "cat.png"}
    return message_of(lambda: llm.chat(conversation(part), SHORT))


@provokes("The URL is in your own network")
def own_network(llm: LLM) -> str:
    part = {"type": "image_url", "image_url": {"url": "http://192.168.0.10/cat.png"}}
    return message_of(lambda: llm.chat(conversation(part), SHORT))


@provokes("Local files are not allowed")
def local_file(llm: LLM) -> str:
    part = {"type": "image_url", "image_url": {"url": "file:///srv/media/cat.png"}}
    return message_of(lambda: llm.chat(conversation(part), SHORT))


class Absent(http.server.BaseHTTPRequestHandler):
    """A host of media that has none."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


@provokes("The media host answers with an error")
def host_error() -> str:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Absent) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{host.server_port}/cat.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        with LLM(model="demo", allowed_media_domains=["127.0.0.1"]) as llm:
            message = message_of(lambda: llm.chat(conversation(part), SHORT))
        host.shutdown()
    return message


@provokes("The media host is too slow")
def host_too_slow() -> str:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cat.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        options = {"allowed_media_domains": ["127.0.0.1"], "image_fetch_timeout": 0.5}
        with LLM(model="demo", **options) as llm:
            return message_of(lambda: llm.chat(conversation(part), SHORT))


@provokes("The file is damaged or something else")
def undecodable(llm: LLM) -> str:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    return message_of(lambda: llm.chat(conversation(part), SHORT))


@provokes("The item is too large")
def too_large(llm: LLM) -> str:
    part = {"type": "image_pil", "image_pil": red().resize((640, 480))}
    return message_of(lambda: llm.chat(conversation(part), SHORT))


@provokes("The id is not cached")
def not_cached(llm: LLM) -> str:
    part = {"type": "image_url", "image_url": None, "uuid": "sku-1234"}
    return message_of(lambda: llm.chat(conversation(part), SHORT))


@provokes("Embeddings are not enabled")
def embeddings(llm: LLM) -> str:
    prompt = {"prompt": PLACEHOLDER, "multi_modal_data": {"image": torch.zeros(1, 16, 256)}}
    return message_of(lambda: llm.generate(prompt, SHORT))


@provokes("Embeddings of a model that generates text")
def embed(llm: LLM) -> str:
    return message_of(lambda: llm.embed("A cat"))


@provokes("One prompt of a list is wrong")
def one_of_a_list(llm: LLM) -> str:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    return message_of(lambda: llm.chat([conversation(), conversation(part)], SHORT))


def _use(llm: LLM, told: Any) -> None:
    told.put(message_of(lambda: llm.generate("Hello", SHORT)))


@provokes("The process was forked")
def forked(llm: LLM) -> str:
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()
    child = fork.Process(target=_use, args=(llm, told))
    child.start()
    message = str(told.get())
    child.join()
    return message


@provokes("The API key is missing or wrong")
def wrong_key(server: Server) -> str:
    return refusal(server, key="guess")


@provokes("The model has another name")
def wrong_name(server: Server) -> str:
    return refusal(server, model="gpt-4o")


@provokes("A field has a wrong value")
def wrong_value(server: Server) -> str:
    return refusal(server, temperature=-1)


@provokes("The body is too large")
def large_body(server: Server) -> str:
    return refusal(server, user="x" * 200_000)


@provokes("The queue is full")
def full(server: Server) -> str:
    """One sample runs and has sent its first token; the three others wait for it.

    Four more have no place until the last of them runs, however slow this client is.
    """
    with ask(server, n=4, stream=True, max_tokens=2000, ignore_eos=True) as stream:
        while b'"content":"' not in stream.readline().replace(b'"content":""', b""):
            pass
        return refusal(server, n=4)


@provokes("The engine is being restarted")
def restarting(server: Server) -> str:
    for engine in server.engines():
        engine.send_signal(signal.SIGKILL)
        engine.wait()
    return refusal(server)


@pytest.mark.slow
@pytest.mark.parametrize("heading", PROVOCATIONS)
def test_the_message_is_the_one_in_the_page(heading: str, request: pytest.FixtureRequest) -> None:
    provocation = PROVOCATIONS[heading]
    names = [n for n in provocation.__annotations__ if n != "return"]
    message = partial(provocation, **{name: request.getfixturevalue(name) for name in names})()
    assert MESSAGES[heading].split() == message.split()


def test_every_message_is_provoked() -> None:
    assert list(MESSAGES) == list(PROVOCATIONS)
