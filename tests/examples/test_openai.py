"""The examples with OpenAI's client run as they are, against servers of small checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from openai.types.chat import ChatCompletion

from tests.checkpoints import make_llava, make_qwen2_5_vl, make_ultravox
from tests.e2e.serving import Server
from tests.examples.test_offline import example

Start = Callable[..., str]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a server of a checkpoint, once; its address as the client wants it."""
    running: dict[str, Server] = {}

    def started(build: Callable[[Path], Path], runner: str = "generate") -> str:
        name = f"{build.__name__}-{runner}"
        if name not in running:
            folder = tmp_path_factory.mktemp(name)
            flags = ("--enable-mm-embeds", "--max-num-seqs", "4", "--num-kv-blocks", "128")
            flags += ("--runner", runner)
            running[name] = Server(str(build(folder / "model")), folder / "log.txt", flags)
        return f"{running[name].url}/v1"

    yield started
    assert [server.stop() for server in running.values()] == [0] * len(running)


def answered(completion: ChatCompletion) -> int:
    """Tokens of the prompt of a request that was answered."""
    assert completion.choices[0].finish_reason in ("stop", "length")
    assert completion.usage is not None
    assert completion.usage.completion_tokens > 0
    return completion.usage.prompt_tokens


@pytest.mark.slow
def test_images(start: Start) -> None:
    media, url = example("openai_media"), start(make_llava)
    one, two = answered(media.one_image(url)), answered(media.several_images(url))
    assert two - one >= 16
    answered(media.cached_image(url))
    assert answered(media.image_embeds(url, torch.randn(1, 16, 64))) == one


@pytest.mark.slow
def test_video(start: Start) -> None:
    answered(example("openai_media").video(start(make_qwen2_5_vl)))


@pytest.mark.slow
def test_audio(start: Start) -> None:
    media, url = example("openai_media"), start(make_ultravox)
    as_data, as_url = media.audio_data(url), media.audio_url(url)
    assert answered(as_data) == answered(as_url)
    assert as_data.choices[0].message.content == as_url.choices[0].message.content


@pytest.mark.slow
def test_embedding(start: Start) -> None:
    found = example("openai_media").embedding(start(make_qwen2_5_vl, "pooling"))
    [embedding] = found.data
    assert sum(value * value for value in embedding.embedding) == pytest.approx(1.0, abs=1e-4)
    assert found.usage.prompt_tokens > 8
