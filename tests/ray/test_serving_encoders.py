"""One encoder and two engines of the demo on Ray: who encodes, and what is answered."""

from __future__ import annotations

import contextlib
import re

import httpx2 as httpx
import psutil
import pytest

from sensorium import LLM, SamplingParams
from tests.e2e.serving import Server
from tests.ray.test_serving import metrics, wait_for
from tests.reliability.media import picture_url

QUESTION = "What is this?"
FLAGS = (
    *("--data-parallel-size", "2", "--encoder-replicas", "1", "--dtype", "float32"),
    *("--num-kv-blocks", "256", "--disable-log-stats", "--ray-application", "apart"),
)


def asked(url: str, seed: int) -> list[int]:
    """Ask about a picture; the tokens of the answer."""
    parts = [
        {"type": "image_url", "image_url": {"url": picture_url(seed)}},
        {"type": "text", "text": QUESTION},
    ]
    body = {"model": "demo", "messages": [{"role": "user", "content": parts}], "max_tokens": 12}
    body |= {"temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def in_one_process(seeds: range) -> list[list[int]]:
    """Tokens of the answers about pictures, by an engine of this process."""
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": picture_url(seed)}},
                    {"type": "text", "text": QUESTION},
                ],
            }
        ]
        for seed in seeds
    ]
    llm = LLM("demo", dtype="float32", num_kv_blocks=256)
    params = SamplingParams(temperature=0, max_tokens=12)
    return [list(output.outputs[0].token_ids) for output in llm.chat(chats, params)]


def encoded_by_engines(url: str) -> float:
    """Items that went through the encoder of some engine."""
    text = httpx.get(f"{url}/metrics").text
    line = r'^sensorium:media_stage_items_total\{engine="\w+".*stage="encode"\} (\S+)$'
    found = re.findall(line, text, re.MULTILINE)
    assert len(found) == 2, "each engine has its line"
    return sum(map(float, found))


def fallbacks(url: str, reason: str) -> float:
    """Items that engines had to encode for a reason."""
    text = httpx.get(f"{url}/metrics").text
    line = rf'^sensorium:encoder_fallback_items_total\{{engine="0".*reason="{reason}"\}} (\S+)$'
    [found] = re.findall(line, text, re.MULTILINE)
    return float(found)


def encoder_process() -> psutil.Process:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("ServeReplica:apart:Encoder" in part for part in process.cmdline()):
                return process
    raise AssertionError("there is no encoder")


@pytest.mark.slow
def test_pictures_are_encoded_apart_and_without_encoders_by_engines(server: Server) -> None:
    expected = in_one_process(range(6))
    assert [asked(server.url, seed) for seed in range(3)] == expected[:3]
    assert asked(server.url, 0) == expected[0]
    items = "encoder_replica_items_total"
    wait_for(lambda: sum(metrics(server.url, items).values()) >= 3)
    assert sum(metrics(server.url, items).values()) == 3, "each once"
    wait_for(lambda: sum(metrics(server.url, "mm_encoder_items_total").values()) >= 3)
    assert encoded_by_engines(server.url) == 0
    assert min(metrics(server.url, "encoder_replica_weight_bytes").values()) > 1e6

    before = set(metrics(server.url, items))
    encoder_process().kill()
    assert asked(server.url, 1) == expected[1], "its embeddings outlive it"
    assert asked(server.url, 3) == expected[3]
    wait_for(lambda: encoded_by_engines(server.url) == fallbacks(server.url, "no_encoder"))
    wait_for(lambda: set(metrics(server.url, items)) - before)
    assert asked(server.url, 4) == expected[4]
    wait_for(lambda: sum(metrics(server.url, items).values()) >= 1)
