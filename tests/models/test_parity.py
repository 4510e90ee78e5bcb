"""Logits and greedy tokens equal those of transformers on the same weights, in every layout,
whole and in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sensorium.models import loader
from tests.checkpoints import (
    make_llava,
    make_llava_onevision,
    make_qwen2_5_vl,
    make_qwen2_vl,
    make_qwen3_vl,
    make_text,
)
from tests.models.harness import Harness, Reference, Running, picture, text_ids

TOLERANCE = 1e-4
WIDER = {"qwen2_5_vl": 3e-4}
"""Where rounding alone makes more: there the reference differs from itself in float64 by as
much."""
NUM_TOKENS = 20
LAYOUTS = ("hub", "resaved", "t5")

Case = tuple[str, list[tuple[int, int]]]
LLAVA_CASES: list[Case] = [
    ("USER: How many birds? ASSISTANT:", []),
    ("USER: <image>\nWhat is shown?\nASSISTANT:", [(97, 33)]),
    ("USER: <image>\n<image>\nWhich is <image> larger? ASSISTANT:", [(20, 70), (300, 41), (1, 1)]),
]
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_CASES: list[Case] = [
    ("<|im_start|>user\nHow many birds?<|im_end|>\n<|im_start|>assistant\n", []),
    (f"<|im_start|>user\n{VISION}What is shown?<|im_end|>\n<|im_start|>assistant\n", [(97, 133)]),
    (
        (
            f"<|im_start|>user\nLeft {VISION} and {VISION}{VISION} right?<|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
        [(60, 200), (300, 61), (28, 28)],
    ),
]
BUILDERS: dict[str, tuple[Callable[..., Path], list[Case]]] = {
    "llava": (make_llava, LLAVA_CASES),
    "llava_onevision": (make_llava_onevision, LLAVA_CASES),
    "qwen2_vl": (make_qwen2_vl, QWEN_CASES),
    "qwen2_5_vl": (make_qwen2_5_vl, QWEN_CASES),
    "qwen3_vl": (make_qwen3_vl, QWEN_CASES),
}


def images_of(case: Case) -> list[np.ndarray]:
    return [picture(height, width, seed=height * width) for height, width in case[1]]


def assert_parity(
    folder: Path, cases: list[Case], tolerance: float = TOLERANCE, **options: object
) -> None:
    """Every case alone, whole and in chunks of 7, then all together with different chunk sizes."""
    harness = Harness(loader.load(str(folder), device="cpu", **options))
    reference = Reference(folder)
    expected = []
    for case in cases:
        ids, images = text_ids(folder, case[0]), images_of(case)
        seq = harness.add(ids, images)
        logits = reference.logits(seq, images)
        expected.append(reference.greedy(seq, NUM_TOKENS, images))
        torch.testing.assert_close(harness.prefill(seq), logits, atol=tolerance, rtol=tolerance)
        chunked = harness.prefill(harness.add(ids, images), chunk=7)
        torch.testing.assert_close(chunked, logits, atol=tolerance, rtol=tolerance)
        assert harness.greedy(harness.add(ids, images), NUM_TOKENS, chunk=11) == expected[-1]
    assert len({tuple(tokens) for tokens in expected}) == len(cases), "answers must vary"
    assert together(harness, folder, cases) == expected


def together(harness: Harness, folder: Path, cases: list[Case]) -> list[list[int]]:
    """Greedy tokens of all cases in one batch whose prompts advance by different chunks."""
    seqs = [harness.add(text_ids(folder, case[0]), images_of(case)) for case in cases]
    found: dict[int, list[int]] = {index: [] for index in range(len(seqs))}
    chunks = [5, 9, 13]
    while any(len(tokens) < NUM_TOKENS for tokens in found.values()):
        spans: list[tuple[Running, int]] = []
        for index, seq in enumerate(seqs):
            if len(found[index]) < NUM_TOKENS:
                left = len(seq.ids) - seq.num_computed
                spans.append((seq, min(left, chunks[index % 3])))
        order = sorted(spans, key=lambda span: span[1] > 1)
        for (seq, _), logits in zip(order, harness.step(spans), strict=True):
            if seq.num_computed == len(seq.ids):
                token = int(logits[-1].argmax())
                found[seqs.index(seq)].append(token)
                seq.ids.append(token)
    return [found[index] for index in range(len(seqs))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_vision_families(tmp_path: Path, family: str, layout: str) -> None:
    build, cases = BUILDERS[family]
    folder = build(tmp_path, layout=layout, seed=LAYOUTS.index(layout), sharded=layout == "hub")
    assert_parity(folder, cases, WIDER.get(family, TOLERANCE))


@pytest.mark.parametrize(
    ("strategy", "layers"), [("full", -2), ("default", [-2, 1]), ("default", -1), ("full", 1)]
)
def test_llava_feature_choices(tmp_path: Path, strategy: str, layers: int | list[int]) -> None:
    folder = make_llava(
        tmp_path, vision_feature_select_strategy=strategy, vision_feature_layer=layers
    )
    assert_parity(folder, LLAVA_CASES[1:2])


def test_llava_without_projector_bias(tmp_path: Path) -> None:
    folder = make_llava(tmp_path, multimodal_projector_bias=False, projector_hidden_act="relu")
    assert_parity(folder, LLAVA_CASES[1:2])


TEXT_PROMPTS: list[Case] = [
    ("The quick brown fox", []),
    ("def answer(question): return three red squares to the left of a blue circle. " * 3, []),
]
LONG = {"short_factor": [1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0]}
LONG["long_factor"] = [4 * factor for factor in LONG["short_factor"]]
TEXT_VARIANTS = {
    "llama": {},
    "llama-biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama-llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama-yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    },
    "qwen2": {},
    "qwen2-yarn": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    },
    "qwen3": {},
    "qwen3-tied": {"tie_word_embeddings": True, "attention_bias": True},
    "mistral": {"head_dim": 24},
    "mistral-window": {"sliding_window": 20},
    "phi3-window": {"sliding_window": 19},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3-window": {
        "use_sliding_window": True,
        "sliding_window": 10,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {},
    "phi3-partial": {"partial_rotary_factor": 0.5},
    "phi3-longrope": {
        "rope_scaling": {"type": "longrope", **LONG},
        "original_max_position_embeddings": 1024,
    },
}


@pytest.mark.parametrize("variant", sorted(TEXT_VARIANTS))
def test_text_families(tmp_path: Path, variant: str) -> None:
    folder = make_text(variant.partition("-")[0], tmp_path, **TEXT_VARIANTS[variant])
    assert_parity(folder, TEXT_PROMPTS)


def test_su_is_the_older_name_of_longrope(tmp_path: Path) -> None:
    folder = make_text("phi3", tmp_path, **TEXT_VARIANTS["phi3-longrope"])
    older = {"rope_scaling": {"type": "su", "rope_type": None}}
    assert_parity(folder, TEXT_PROMPTS, hf_overrides=older)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_newer_config_spelling(tmp_path: Path, family: str) -> None:
    scaling = {"rope_scaling": {"type": "linear", "factor": 2.0}} if family != "phi3" else {}
    folder = make_text(family, tmp_path, layout="t5", sharded=True, **scaling)
    assert "rope_parameters" in (folder / "config.json").read_text()
    assert_parity(folder, TEXT_PROMPTS)


def test_longrope_is_chosen_by_the_length_of_the_sequence(tmp_path: Path) -> None:
    """One prompt ends before the original length, one behind it."""
    rope = {"rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 32}
    folder = make_text("phi3", tmp_path, **rope)
    assert_parity(folder, TEXT_PROMPTS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_half_precision_is_close(tmp_path: Path, family: str, dtype: str) -> None:
    build, cases = BUILDERS[family]
    folder = build(tmp_path, dtype=dtype)
    loaded = loader.load(str(folder), device="cpu", dtype=dtype)
    harness, images = Harness(loaded), images_of(cases[2])
    seq = harness.add(text_ids(folder, cases[2][0]), images)
    exact = Reference(folder).logits(seq, images)
    error = (harness.prefill(seq) - exact).abs().mean() / exact.abs().mean()
    theirs = Reference(folder, loaded.model.dtype).logits(seq, images)
    their_error = (theirs - exact).abs().mean() / exact.abs().mean()
    assert error < 1.5 * their_error + 0.002, (error, their_error)


def test_the_picture_decides_the_answer(tmp_path: Path) -> None:
    """Guards the other tests: if these checkpoints ignored pictures, parity would show nothing."""
    for family, (build, cases) in BUILDERS.items():
        folder = build(tmp_path / family)
        harness = Harness(loader.load(str(folder), device="cpu"))
        ids = text_ids(folder, cases[1][0])
        answers = {
            tuple(harness.greedy(harness.add(ids, [picture(60, 90, seed)]), 8)) for seed in range(6)
        }
        assert len(answers) >= 5, family
