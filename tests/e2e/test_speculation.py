"""Answers are the same, to the last bit of their log-probabilities, whether tokens are tried.

All that is proposed is tried here, and nearly everything repeats: the vocabulary of most requests
is small, so that many tokens are right and many are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensorium import LoRARequest, RequestOutput, SamplingParams
from sensorium.core.speculation.speculator import Speculator
from sensorium.params import StructuredOutputs
from tests import checkpoints
from tests.checkpoints.adapters import make_adapter
from tests.checkpoints.hf import make_hf_text
from tests.e2e.prompts import WORDS, image
from tests.parts import build_patient

TRIED = {"speculative": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 5}
SMALL = {"block_size": 16, "max_model_len": 256, "dtype": "float32"}
SETTINGS: dict[str, dict[str, Any]] = {
    "together": {"num_kv_blocks": 800},
    "in chunks": {"num_kv_blocks": 800, "max_num_batched_tokens": 9},
    "preempted": {"num_kv_blocks": 18, "max_num_batched_tokens": 64},
    "few at a time": {"num_kv_blocks": 800, "max_num_seqs": 2, "enable_prefix_caching": False},
}
FEW = tuple(range(40, 46))
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
DRAWN: dict[str, Any] = {"temperature": 0.8, "seed": 3, "max_tokens": 40, "ignore_eos": True}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "greedy with log-probabilities": {**GREEDY, "logprobs": 4, "prompt_logprobs": 2},
    "few tokens": {**GREEDY, "allowed_token_ids": FEW, "logprobs": 2},
    "drawn of few tokens": {**DRAWN, "allowed_token_ids": FEW, "logprobs": 2},
    "drawn": {**DRAWN, "temperature": 0.05, "logprobs": 3},
    "filtered": {**DRAWN, "top_p": 0.7, "top_k": 5, "min_p": 0.01},
    "penalties": {**GREEDY, "allowed_token_ids": FEW, "frequency_penalty": 0.2, "logprobs": 2},
    "presence": {**DRAWN, "allowed_token_ids": FEW, "presence_penalty": 0.4, "logprobs": 2},
    "repetition": {**GREEDY, "repetition_penalty": 1.02, "logprobs": 2},
    "biased": {**DRAWN, "logit_bias": {40: 30.0, 41: 30.0, 42: 29.0}, "logprobs": 1},
    "bad words": {**DRAWN, "allowed_token_ids": FEW, "bad_words": ["a"], "logprobs": 2},
    "stop tokens": {
        **GREEDY, "ignore_eos": False, "allowed_token_ids": FEW, "stop_token_ids": [44],
    },
    "no stop too early": {
        **DRAWN, "allowed_token_ids": FEW, "stop_token_ids": [44], "min_tokens": 11,
    },
    "several samples": {**DRAWN, "allowed_token_ids": FEW, "n": 3},
    "short": {**GREEDY, "max_tokens": 2},
    "one of some": {
        "temperature": 1.0, "seed": 1, "max_tokens": 60, "logprobs": 2,
        "structured_outputs": StructuredOutputs(regex="(abc|abd){12}"),
    },
    "an object": {
        "temperature": 0.7, "seed": 2, "max_tokens": 60,
        "structured_outputs": StructuredOutputs(
            json={"type": "array", "items": {"enum": ["cat", "car"]}, "minItems": 4, "maxItems": 5}
        ),
    },
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def everything_is_tried() -> Iterator[None]:
    def choose(speculator: Speculator, step: Any, chances: Sequence[Sequence[float]]) -> list[int]:
        nums, most = [], step.most
        for own in chances:
            nums.append(min(len(own), most))
            most -= nums[-1]
        return nums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Speculator, "choose", choose)
        patch.setattr(Speculator, "may_pay", lambda *_: True)
        yield


def texts() -> list[str]:
    """Prompts that repeat a phrase, of several lengths."""
    rng = np.random.default_rng(2)
    phrases = [" ".join(rng.choice(WORDS, 6)) for _ in range(len(PARAMS))]
    return [" ".join([phrase] * (2 + number % 4)) for number, phrase in enumerate(phrases)]


def answers(outputs: Sequence[RequestOutput]) -> list[Any]:
    return [
        [
            (
                sample.token_ids,
                sample.text,
                sample.finish_reason,
                sample.stop_reason,
                sample.cumulative_logprob,
                [{i: (e.logprob, e.rank) for i, e in at.items()} for at in sample.logprobs or ()],
            )
            for sample in output.outputs
        ]
        for output in outputs
    ]


def ask(
    model: Path,
    prompts: Sequence[Any],
    params: Sequence[Any],
    adapters: Any = None,
    **options: Any,
) -> list[Any]:
    """Return the answers, after looking at what was tried."""
    with build_patient(model, **{**SMALL, **options}) as parts:
        outputs = parts.llm.generate(
            list(prompts), list(params), use_tqdm=False, lora_request=adapters
        )
        parts.engine.check_integrity()
        stats = parts.llm.stats()
        assert stats.kv_blocks_used == 0
        if "speculative" in options:
            assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
            assert sum(stats.num_accepted_at) == stats.num_accepted_tokens
            assert stats.num_steps < stats.generation_tokens
        else:
            assert stats.num_drafts == 0
        if options.get("num_kv_blocks") == 18:
            assert stats.num_preemptions > 0
    return answers(outputs)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_text("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def plain(model: Path) -> dict[str, Any]:
    """Answers without trying, by the name of the parameters."""
    params = [SamplingParams(**given) for given in PARAMS.values()]
    found = ask(model, texts(), params, num_kv_blocks=800)
    assert [len(each) for each in found].count(3) == 1
    return dict(zip(PARAMS, found, strict=True))


@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_kind_of_request(model: Path, plain: dict[str, Any], name: str) -> None:
    params = [SamplingParams(**given) for given in PARAMS.values()]
    found = ask(model, texts(), params, **SETTINGS[name], **TRIED)
    for kind, answer in zip(PARAMS, found, strict=True):
        assert answer == plain[kind], kind


def test_stop_strings_inside_of_what_comes_in_one_step(model: Path, plain: dict[str, Any]) -> None:
    [(_, text, *_)] = plain["few tokens"]
    starts = range(len(text) - 4)
    stop = max((text[start : start + 4] for start in starts), key=text.index)
    params = SamplingParams(**{**PARAMS["few tokens"], "stop": stop})
    prompt = [texts()[list(PARAMS).index("few tokens")]]
    [[own]] = ask(model, prompt, [params], num_kv_blocks=800)
    [[found]] = ask(model, prompt, [params], num_kv_blocks=800, **TRIED)
    assert found == own
    assert found[2:4] == ("stop", stop)
    assert found[1] == text[: text.index(stop)]


def test_an_expected_answer(model: Path, plain: dict[str, Any]) -> None:
    """Its tokens are tried beside those that repeat: the answer itself, and one of other words."""
    [(token_ids, text, *_)] = plain["few tokens"]
    params = SamplingParams(**PARAMS["few tokens"])
    prompt = texts()[list(PARAMS).index("few tokens")]
    halves = text[len(text) // 2 :] + text[: len(text) // 2]
    expected = [text, halves, "neither of them " * 200]
    with build_patient(model, **SMALL, num_kv_blocks=800, **TRIED) as parts:
        given = [params.replace(prediction=each) for each in (*expected, None)]
        found = parts.llm.generate([prompt] * len(given), given, use_tqdm=False)
        stopped = params.replace(prediction=text, stop=[text[6:10]])
        [cut] = parts.llm.generate([prompt], [stopped], use_tqdm=False)
        parts.engine.check_integrity()
    assert answers(found) == [plain["few tokens"]] * len(given)
    counts = [
        (each.outputs[0].accepted_prediction_tokens, each.outputs[0].rejected_prediction_tokens)
        for each in found
    ]
    assert counts[0][0] > len(token_ids) // 2
    assert counts[1][0] > 0
    assert counts[2][0] == 0
    assert counts[3] == (0, 0)
    assert cut.outputs[0].finish_reason == "stop"
    assert cut.outputs[0].accepted_prediction_tokens < len(cut.outputs[0].token_ids)


def test_adapters_in_one_batch(model: Path, tmp_path: Path) -> None:
    first, second = (
        LoRARequest(str(seed), seed, str(make_adapter(tmp_path / str(seed), model, seed=seed)))
        for seed in (1, 2)
    )
    kinds = ("greedy", "few tokens", "drawn of few tokens", "repetition", "drawn")
    params = [SamplingParams(**PARAMS[kind]) for kind in kinds]
    adapters = [first, None, second, first, second]
    options: dict[str, Any] = {"num_kv_blocks": 400, "enable_lora": True, "max_loras": 2}
    own = ask(model, texts()[:5], params, adapters, **options)
    assert ask(model, texts()[:5], params, adapters, **options, **TRIED) == own


def llava_prompts(placeholder: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    return [
        {
            "prompt": f"{placeholder} {text} {placeholder} {text}",
            "multi_modal_data": {"image": [image(rng), image(rng)]},
        }
        for text in texts()[:4]
    ]


FAMILIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "qwen2_vl": (checkpoints.make_qwen2_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
    "mistral, windowed": (
        lambda folder: checkpoints.make_text("mistral", folder, sliding_window=17),
        "",
    ),
    "gemma2": (lambda folder: make_hf_text("gemma2", folder), ""),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families(tmp_path: Path, family: str) -> None:
    make, placeholder = FAMILIES[family]
    make(tmp_path)
    prompts: list[Any] = llava_prompts(placeholder) if placeholder else texts()[:4]
    kinds = ("greedy with log-probabilities", "few tokens", "drawn of few tokens", "drawn")
    params = [SamplingParams(**PARAMS[kind]) for kind in kinds]
    options: dict[str, Any] = {"num_kv_blocks": 400, "max_num_batched_tokens": 64}
    own = ask(tmp_path, prompts, params, **options)
    assert ask(tmp_path, prompts, params, **options, **TRIED) == own
