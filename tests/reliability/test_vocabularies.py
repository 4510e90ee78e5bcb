"""A tokenizer with tokens that the model has no embedding for.

Every way from text to ids ends in a check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from sensorium import LLM, SamplingParams
from sensorium.errors import InvalidRequestError
from tests import checkpoints
from tests.checkpoints.common import VOCAB_SIZE
from tests.e2e.serving import Server
from tests.models.harness import picture
from tests.reliability.asking import CHAT, Answer, Service, serving

NEW = "<|new_word|>"
ROOM = ("--num-kv-blocks", "100", "--block-size", "16", "--max-model-len", "300")
OFFLINE: dict[str, Any] = {"num_kv_blocks": 100, "block_size": 16, "max_model_len": 300}
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: checkpoints.make_text("llama", folder),
    "phi3": lambda folder: checkpoints.make_text("phi3", folder),
    "qwen2_vl": checkpoints.make_qwen2_vl,
    "phi3_v": checkpoints.make_phi3_v,
}


def extend(folder: Path, *texts: str) -> Path:
    """Add tokens to the tokenizer of a checkpoint, and leave the model as it is.

    Ids from ``VOCAB_SIZE`` on.
    """
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    num_known = tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<|filler{number}|>" for number in range(num_known, VOCAB_SIZE)])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    assert tokenizer.token_to_id(texts[0]) == VOCAB_SIZE
    tokenizer.save(path)
    return folder


class Vectors(Service):
    """A server that makes vectors, and answers no chat."""

    def good_answer(self) -> tuple[Any, str]:
        return self.post("/v1/embeddings", {"input": "fine"}).status, ""


def refusal(answer: Answer, param: str) -> None:
    answer.is_refusal(400, "invalid_request", param)
    assert answer.error["message"].startswith(
        f"The prompt holds the token {NEW!r} (id {VOCAB_SIZE}), which the tokenizer has, but not "
        "the model, whose "
        f"vocabulary is of {VOCAB_SIZE}."
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extend(checkpoints.make_text("qwen2", tmp_path_factory.mktemp("longer")), NEW, "<|2|>")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    trusted = ("--trust-request-chat-template",)
    with serving(str(folder), tmp_path_factory.mktemp("log"), ROOM + trusted) as service:
        yield service


def test_completions(server: Service) -> None:
    for prompt in (f"a {NEW} b", [1, 2, VOCAB_SIZE]):
        refusal(server.post("/v1/completions", {"prompt": prompt, "max_tokens": 2}), "prompt")
    several = server.post("/v1/completions", {"prompt": ["fine", NEW], "max_tokens": 2})
    refusal(several, "prompt[1]")
    beyond = server.post("/v1/completions", {"prompt": [VOCAB_SIZE + 2], "max_tokens": 2})
    beyond.is_refusal(400, "invalid_request", "prompt")
    assert f"{VOCAB_SIZE + 2} is outside the model's vocabulary" in beyond.error["message"]


def test_a_template_that_writes_one_and_a_user_who_types_one(server: Service) -> None:
    messages = [{"role": "user", "content": "hello"}]
    written = {"chat_template": "{{ messages[0].content }}" + NEW}
    refusal(server.chat(messages, **written), "messages")
    refusal(server.post(CHAT, {"messages": messages, "stream": True, **written}), "messages")
    typed = server.chat([{"role": "user", "content": f"what is {NEW}?"}])
    assert typed.status == 200, "what a user types is text, whatever it spells"


def test_the_rest_is_served_and_the_log_has_one_warning(server: Service) -> None:
    assert server.post("/v1/completions", {"prompt": "a b", "max_tokens": 2}).status == 200
    log = server.server.log.read_text()
    assert log.count("embedding table") == 1
    assert f"2 tokens that the model's embedding table of {VOCAB_SIZE} rows has not" in log
    assert f"{NEW!r} ({VOCAB_SIZE})" in log
    assert "Traceback" not in log


def test_inputs_of_embeddings(folder: Path, tmp_path: Path) -> None:
    server = Server(str(folder), tmp_path / "log", (*ROOM, "--runner", "pooling"))
    try:
        service = Vectors(server)
        for value in (NEW, [1, VOCAB_SIZE]):
            refusal(service.post("/v1/embeddings", {"input": value}), "input")
        refusal(service.post("/v1/embeddings", {"input": ["fine", f"a{NEW}"]}), "input[1]")
        assert service.good_answer() == (200, "")
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_offline_in_several_families(tmp_path: Path, family: str) -> None:
    folder = extend(FAMILIES[family](tmp_path), NEW)
    params = SamplingParams(max_tokens=1)
    with LLM(str(folder), **OFFLINE) as llm:
        for prompt in (f"a {NEW}", {"prompt_token_ids": [5, VOCAB_SIZE]}):
            with pytest.raises(InvalidRequestError, match=rf"\(id {VOCAB_SIZE}\), which the"):
                llm.generate([prompt], params, use_tqdm=False)
        assert llm.generate(["a"], params, use_tqdm=False)[0].finished


def test_placeholders_past_the_table_are_no_such_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ultravox v0.6 is published with ``<|audio|>`` one past the vocabulary: it is never looked up."""
    folder = extend(checkpoints.make_ultravox(tmp_path), "<|audio|>")
    with caplog.at_level("WARNING"), LLM(str(folder), **OFFLINE) as llm:
        assert llm.generate(["a"], SamplingParams(max_tokens=1), use_tqdm=False)[0].finished
    assert "embedding table" not in caplog.text


def moved(folder: Path, token: str) -> Path:
    """Give a token of the tokenizer an id past the model's table."""
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(f'"{token}"', '"<|nobody|>"'))
    return extend(folder, token)


@pytest.mark.parametrize(
    ("make", "placeholder", "token"),
    [
        (checkpoints.make_minicpmv, "(<image>./</image>)", "<slice>"),
        (
            checkpoints.make_qwen2_vl,
            "<|vision_start|><|image_pad|><|vision_end|>",
            "<|vision_end|>",
        ),
    ],
)
def test_tokens_that_a_processor_puts_around_items(
    tmp_path: Path, make: Callable[[Path], Path], placeholder: str, token: str
) -> None:
    folder = moved(make(tmp_path), token)
    prompt = {"prompt": f"{placeholder} a", "multi_modal_data": {"image": [picture(224, 112, 1)]}}
    with LLM(str(folder), **OFFLINE) as llm:
        with pytest.raises(
            InvalidRequestError, match=f"the token {re.escape(repr(token))}"
        ) as caught:
            llm.generate(prompt, use_tqdm=False)
        assert caught.value.status == 400
        assert llm.generate("a b", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_what_items_replace_may_lie_past_the_table(tmp_path: Path) -> None:
    """The padding that a processor writes where embeddings go is never looked up."""
    folders = [tmp_path / "plain", tmp_path / "moved"]
    for folder in folders:
        folder.mkdir()
        checkpoints.make_minicpmv(folder)
    moved(folders[1], "<unk>")
    image = {"image": [picture(224, 112, 1)]}
    prompt = {"prompt": "(<image>./</image>) a", "multi_modal_data": image}
    params = SamplingParams(temperature=0, max_tokens=8)
    outputs = []
    for folder in folders:
        with LLM(str(folder), **OFFLINE) as llm:
            outputs += llm.generate(prompt, params, use_tqdm=False)
    assert VOCAB_SIZE in outputs[1].prompt_token_ids
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
