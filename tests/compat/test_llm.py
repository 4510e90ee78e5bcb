"""Keywords of vLLM's ``LLM`` at work.

Priorities, types by their older names, defaults of sampling, warnings once.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensorium import LLM, SamplingParams
from sensorium.config import engine_config
from sensorium.engine import wire
from sensorium.engine.prompts.defaults import generation_values, sampling_defaults
from sensorium.engine.prompts.types import parse_prompt
from sensorium.errors import ConfigError, InvalidRequestError, RequestError
from sensorium.text.chat.chat_template import parse_messages
from tests.checkpoints import make_text

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
CHATS = [[{"role": "user", "content": f"Say {n}"}] for n in "abcde"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", max_num_seqs=1, max_model_len=256, num_kv_blocks=64, dtype="float") as llm:
        yield llm


def test_float_is_float32(llm: LLM) -> None:
    assert llm.config.model.dtype == "float32"
    assert engine_config(dtype="half").model.dtype == "float16"
    assert engine_config(dtype="float16") == engine_config(dtype="half")


def test_lower_priorities_finish_first(llm: LLM) -> None:
    priority = [3, 0, 3, -1, 0]
    finished = [
        o.index for o in llm.chat(CHATS, GREEDY, use_tqdm=False, priority=priority, stream=True)
    ]
    assert finished == [3, 1, 4, 0, 2]
    prompts = [output.prompt_token_ids for output in llm.chat(CHATS, GREEDY, use_tqdm=False)]
    ids = [{"prompt_token_ids": prompt} for prompt in prompts]
    streamed = llm.generate(ids, GREEDY, use_tqdm=False, priority=priority, stream=True)
    assert [o.index for o in streamed] == [3, 1, 4, 0, 2]


def test_outputs_keep_the_order_of_the_prompts(llm: LLM) -> None:
    plain = llm.chat(CHATS, GREEDY, use_tqdm=False)
    for priority in ([3, 0, 3, -1, 0], 7, None):
        outputs = llm.chat(CHATS, GREEDY, use_tqdm=False, priority=priority)
        assert [o.prompt_token_ids for o in outputs] == [o.prompt_token_ids for o in plain]
        assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]


@pytest.mark.parametrize(
    ("prompts", "priority", "words"),
    [
        (["a", "b"], [1], "1 entries for 2 prompts"),
        (iter(["a", "b"]), [1, 2], "for an iterator's prompts"),
        (["a"], [True], "must be an integer"),
        (["a"], ["1"], "must be an integer"),
        (["a"], 1 << 40, "must be an integer between"),
        (["a"], "1", "must be an integer"),
    ],
)
def test_priorities_that_are_none(llm: LLM, prompts: Any, priority: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        llm.generate(prompts, GREEDY, use_tqdm=False, priority=priority)
    assert caught.value.param == "priority"


def test_an_error_with_priorities_names_the_callers_prompt(llm: LLM) -> None:
    prompts = ["a", "b", {"prompt": "x" * 5000}]
    with pytest.raises(RequestError, match="Prompt 2") as caught:
        llm.generate(prompts, GREEDY, use_tqdm=False, priority=[5, 4, 1])
    assert caught.value.index == 2


def test_keywords_of_calls_that_ask_for_nothing_pass(llm: LLM) -> None:
    plain = llm.generate("a", GREEDY, use_tqdm=False)
    others = {"lora_request": None, "tokenization_kwargs": {}, "mm_processor_kwargs": None}
    assert llm.generate("a", GREEDY, use_tqdm=False, **others)[0].outputs == plain[0].outputs
    llm.chat(
        CHATS[0], GREEDY, use_tqdm=False, lora_request=None, chat_template_content_format="auto"
    )


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"lora_request": object()}, "lora_request must be a LoRARequest"),
        ({"tokenization_kwargs": {"a": 1}}, "tokenization_kwargs is not supported"),
        ({"mm_processor_kwargs": {"max_pixels": 5}}, "in each prompt"),
    ],
)
def test_keywords_of_calls_that_cannot_be_had(
    llm: LLM, keywords: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        llm.generate("a", GREEDY, use_tqdm=False, **keywords)
    assert caught.value.param == next(iter(keywords))
    with pytest.raises(TypeError, match="no_such"):
        llm.generate("a", GREEDY, use_tqdm=False, no_such=1)


OWN = {"temperature": 0.3, "top_p": 0.5, "do_sample": True, "max_new_tokens": 9}


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({}, {"temperature": 0.3, "top_p": 0.5, "max_tokens": 9}),
        ({"generation_config": "vllm"}, {}),
        (
            {"override_generation_config": {"temperature": 0.7, "max_new_tokens": None}},
            {"temperature": 0.7, "top_p": 0.5},
        ),
        ({"generation_config": "vllm", "override_generation_config": {"top_k": 3}}, {"top_k": 3}),
    ],
)
def test_where_defaults_of_sampling_come_from(
    keywords: dict[str, Any], expected: dict[str, Any]
) -> None:
    model = engine_config(**keywords).model
    assert sampling_defaults(generation_values(OWN, model)) == expected


def test_defaults_of_another_folder(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_k": 7, "do_sample": false}')
    model = engine_config(generation_config=str(tmp_path)).model
    assert sampling_defaults(generation_values(OWN, model)) == {"temperature": 0.0}
    over = engine_config(
        generation_config=tmp_path, override_generation_config={"temperature": 2}
    ).model
    assert sampling_defaults(generation_values(OWN, over)) == {"temperature": 2, "top_k": 7}


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"generation_config": "/no/such"}, "cannot be read"),
        ({"override_generation_config": {"temprature": 1}}, "Did you mean 'temperature'"),
        ({"override_generation_config": {"temperature": -1}}, "temperature must be"),
        ({"override_generation_config": []}, "must be a mapping"),
    ],
)
def test_defaults_that_cannot_be_fail_at_start(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generation_values(OWN, engine_config(**keywords).model)


def test_downloads_have_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of the hub's cache, which is read without the network."""
    sha = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--tiny"
    make_text("llama", repository / "snapshots" / sha)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(sha)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    room = {"max_model_len": 64, "num_kv_blocks": 16}
    with LLM("somebody/tiny", download_dir=tmp_path, tokenizer="somebody/tiny", **room) as llm:
        output = llm.generate("a", GREEDY, use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 4
    with pytest.raises(ConfigError, match="somebody/tiny"):
        LLM("somebody/tiny", **room)


SCRIPT = """\
from sensorium.config import engine_config
from sensorium.multimodal.decode.image import ImagePixelData
engine_config(task="generate", image_token_id=5)
for _ in range(3):
    engine_config(
        model="demo", swap_space=4)
ImagePixelData(None)
from sensorium import LLM
try:
    LLM("demo", task="embed", runner="pooling", max_model_len=0)
except ValueError:
    pass
try:
    LLM("/no/such", task="embed")
except ValueError:
    pass
"""


def test_warnings_are_seen_once_with_the_callers_line(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [
        line.partition("mine.py:")[2] for line in done.stderr.splitlines() if "Warning: " in line
    ]
    assert [line.partition(": ")[0] for line in said] == ["3", "3", "5", "7", "14"]
    subjects = " ".join(line.split()[2] for line in said)
    assert subjects == "task image_token_id swap_space ImagePixelData task"


def test_older_names_in_prompts_are_warned_of_at_the_call() -> None:
    """Not in the thread that loads media, which has no line of the caller's."""
    embeds = {"image_embeds": np.zeros((1, 2, 3), np.float32), "image_size_list": [(1, 1)]}
    part = {
        "type": "image_embeds",
        "image_embeds": {**embeds, "image_embeds": torch.zeros(1, 2, 3)},
    }
    prompt = {"prompt": "x", "multi_modal_data": {"image": embeds}}
    calls = (
        lambda: parse_prompt(prompt, enable_mm_embeds=True),
        lambda: parse_messages([{"role": "user", "content": [part]}]),
    )
    for call in calls:
        with pytest.warns(DeprecationWarning, match="image_size_list") as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]


def test_another_process_does_not_warn_again(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        config = engine_config(task="generate", image_input_type="pixel_values")
    recwarn.clear()
    received = wire.decode_to_engine(wire.encode(wire.Configure(config)))
    assert isinstance(received, wire.Configure)
    assert received.config == config
    assert not [w for w in recwarn if w.category is DeprecationWarning]


@pytest.mark.slow
def test_a_command_says_it_once() -> None:
    command = [sys.executable, "-m", "sensorium", "generate", "hello", "--task", "generate"]
    done = subprocess.run(
        [*command, "--max-tokens", "1"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("deprecated") == 1
    assert "warning: task is deprecated" in done.stderr
