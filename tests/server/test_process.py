"""``sensorium serve demo`` as users start it: a process with its engine, a socket, signals."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest
from PIL import Image, ImageDraw
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.serving import tied_to_this_process

pytestmark = pytest.mark.slow
START_SECONDS = 300


class Server:
    """The process, from its announcement on."""

    def __init__(self, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sensorium", "serve", "demo", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=tied_to_this_process(),
        )

    def base_url(self) -> str:
        """Where it listens, once it says so."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"^Sensorium \S+ serving demo at (http://127\.0\.0\.1:\d+)$", line)
        assert found is not None, (line, self.process.stderr and self.process.stderr.read())
        return found[1]

    def children(self) -> list[psutil.Process]:
        """Its engine, and the engine's workers."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Ask it to stop; its error stream. Its children must be gone with it, and its status be 0."""
        children = self.children()
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, errors
        _, alive = psutil.wait_procs(children, timeout=300)
        assert not alive
        return errors


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Server, str]]:
    started = Server("--max-model-len", "1024")
    try:
        yield started, started.base_url()
        errors = started.stop()
        assert "Traceback" not in errors, errors
    finally:
        started.process.kill()


def red_circle() -> str:
    """A picture as a data URL."""
    picture = Image.new("RGB", (200, 160), "white")
    ImageDraw.Draw(picture).ellipse((60, 40, 140, 120), fill="red")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def question(url: str) -> list[dict[str, Any]]:
    """What colour the picture has."""
    text = {"type": "text", "text": "What color is the circle?"}
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}]


def test_a_picture_is_seen_and_remembered(server: tuple[Server, str]) -> None:
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)
    ask = {"model": "demo", "messages": question(red_circle()), "temperature": 0, "max_tokens": 8}
    first, second = (client.chat.completions.create(**ask) for _ in range(2))
    text = first.choices[0].message.content
    assert text
    assert second.choices[0].message.content == text
    details = second.usage.prompt_tokens_details
    assert details.image_tokens > 0
    assert details.cached_tokens > 0
    stream = client.chat.completions.create(**ask, stream=True)
    pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
    assert "".join(pieces) == text


def counts(url: str) -> dict[str, float]:
    """Sums of the metrics that vLLM's own tests count, by the name of the series."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=300).read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_ten_requests_of_ten_tokens_are_counted(server: tuple[Server, str]) -> None:
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)
    before = counts(server[1])
    prompt = list(range(300, 320))
    for _ in range(10):
        fields = {"ignore_eos": True}
        client.completions.create(model="demo", prompt=prompt, max_tokens=10, extra_body=fields)
    after = counts(server[1])
    expected = {
        "time_to_first_token_seconds_count": 10,
        "inter_token_latency_seconds_count": 90,
        "e2e_request_latency_seconds_count": 10,
        "request_prompt_tokens_sum": 200,
        "request_generation_tokens_sum": 100,
        "request_params_max_tokens_sum": 100,
        "iteration_tokens_total_sum": 300,
        "iteration_tokens_total_count": 100,
        "prompt_tokens_total": 200,
        "generation_tokens_total": 100,
        "request_success_total": 10,
    }
    found = {name: after[f"sensorium:{name}"] - before[f"sensorium:{name}"] for name in expected}
    assert found == expected


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1:9/x.png", "media_refused"),
        ("http://[::ffff:10.0.0.1]/x.png", "media_refused"),
        ("file:///etc/passwd", "media_refused"),
        ("data:image/png;base64,AAAA", "media_undecodable"),
    ],
)
def test_wrong_pictures_harm_nothing(server: tuple[Server, str], url: str, code: str) -> None:
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=question(url))
    assert caught.value.code == code
    assert caught.value.param == "messages[0].content[0].image_url"
    answer = client.completions.create(model="demo", prompt="Hello", max_tokens=2)
    assert answer.choices[0].text


async def test_clients_that_leave_free_their_work(server: tuple[Server, str]) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server[1]}/v1", api_key="none") as client:

        async def leave_midway(number: int) -> None:
            stream = await client.completions.create(
                model="demo", prompt=f"{number}", max_tokens=900, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            await anext(aiter(stream))
            await stream.close()

        await asyncio.gather(*(leave_midway(i) for i in range(12)))
        metrics = f"{server[1]}/metrics"

        async def running() -> float:
            text = await asyncio.to_thread(_get, metrics)
            found = re.search(r"num_requests_running\{.*\} (\S+)", text)
            assert found is not None
            return float(found[1])

        async with asyncio.timeout(60):
            while await running():
                await asyncio.sleep(0.05)
        assert "kv_cache_usage_perc" in await asyncio.to_thread(_get, metrics)


def _get(url: str) -> str:
    from urllib.request import urlopen

    with urlopen(url, timeout=300) as response:
        return str(response.read().decode())


def test_a_model_that_is_not_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sensorium", "serve", "/no/such/model", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "/no/such/model" in line
    assert "Traceback" not in done.stderr
