"""Ultravox equals an independent plain implementation.

Embeddings, logits, greedy tokens, whole and in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from sensorium.models import loader
from sensorium.models.families.ultravox.model import UltravoxModel
from sensorium.models.parts.whisper import MelChunk
from sensorium.multimodal.items import Audio
from sensorium.multimodal.placeholders import marker
from tests.checkpoints import make_ultravox
from tests.models.harness import Harness, Running, text_ids
from tests.models.plain_ultravox import PlainUltravox

TOLERANCE = 1e-4
NUM_TOKENS = 12
RATE = 16000
AUDIO = "<|audio|>"

Case = tuple[str, list[int]]
"""A prompt, and the lengths of its sounds in samples. The tiny encoder takes 32000 at once."""
CASES: list[Case] = [
    ("How many birds are there?", []),
    (AUDIO, [7231]),
    (f"First {AUDIO} then {AUDIO}{AUDIO} which is longer?", [161, 12_800, 31_999]),
    (f"{AUDIO} What was said?", [66_011]),
    (f"Listen: {AUDIO}", [32_160]),
]


def sound(length: int) -> Audio:
    """Tones that rise and fall, with noise."""
    rng = np.random.default_rng(length)
    time = np.arange(length) / RATE
    pitch = rng.uniform(100, 3000) * (1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.3, 2) * time))
    tone = np.sin(2 * np.pi * np.cumsum(pitch) / RATE) * rng.uniform(0.1, 0.9)
    return Audio((tone + rng.normal(0, 0.01, length)).astype(np.float32), RATE)


def split(folder: Path, text: str) -> list[list[int]]:
    """Ids of the texts between the placeholders; a BOS only in front."""
    first, *rest = text.split(AUDIO)
    bos = text_ids(folder, "")
    return [text_ids(folder, first), *(text_ids(folder, part)[len(bos) :] for part in rest)]


def marked(folder: Path, text: str) -> list[int]:
    """Ids with markers for the placeholders."""
    first, *rest = split(folder, text)
    return [*first, *(i for part in rest for i in (marker("audio"), *part))]


def woven(texts: list[list[int]], embeds: list[torch.Tensor]) -> list[list[int] | torch.Tensor]:
    """Texts with embeddings between them."""
    pieces: list[list[int] | torch.Tensor] = [texts[0]]
    for own, text in zip(embeds, texts[1:], strict=True):
        pieces += [own, text]
    return pieces


def start(harness: Harness, folder: Path, case: Case) -> Running:
    return harness.add(marked(folder, case[0]), [sound(length) for length in case[1]])


def assert_parity(folder: Path, cases: list[Case], **options: object) -> None:
    """Each case whole, in chunks of 7 and of 5; then all in one batch."""
    harness = Harness(loader.load(str(folder), device="cpu", **options))
    plain, expected = PlainUltravox(folder), []
    for case in cases:
        embeds = [plain.embeds(sound(length).samples) for length in case[1]]
        pieces = woven(split(folder, case[0]), embeds)
        seq = start(harness, folder, case)
        for own, reference, length in zip(seq.embeds, embeds, case[1], strict=True):
            assert len(reference) == plain.num_tokens(length)
            torch.testing.assert_close(own, reference, atol=TOLERANCE, rtol=TOLERANCE)
        logits = plain.logits(pieces)
        torch.testing.assert_close(harness.prefill(seq), logits, atol=TOLERANCE, rtol=TOLERANCE)
        chunked = harness.prefill(start(harness, folder, case), chunk=7)
        torch.testing.assert_close(chunked, logits, atol=TOLERANCE, rtol=TOLERANCE)
        expected.append(plain.greedy(pieces, NUM_TOKENS))
        assert harness.greedy(start(harness, folder, case), NUM_TOKENS, chunk=5) == expected[-1]
    assert len({tuple(tokens) for tokens in expected}) == len(cases), "answers must vary"
    assert together(harness, folder, cases) == expected


def together(harness: Harness, folder: Path, cases: list[Case]) -> list[list[int]]:
    """Greedy tokens of all cases in one batch."""
    seqs = [start(harness, folder, case) for case in cases]
    found: list[list[int]] = [[] for _ in seqs]
    while any(len(tokens) < NUM_TOKENS for tokens in found):
        open_seqs = [i for i, tokens in enumerate(found) if len(tokens) < NUM_TOKENS]
        spans = [
            (seqs[i], min(len(seqs[i].ids) - seqs[i].num_computed, 5 + 4 * i)) for i in open_seqs
        ]
        order = sorted(open_seqs, key=lambda i: dict(zip(open_seqs, spans, strict=True))[i][1] > 1)
        for i, logits in zip(order, harness.step(spans), strict=True):
            if seqs[i].num_computed == len(seqs[i].ids):
                found[i].append(int(logits[-1].argmax()))
                seqs[i].ids.append(found[i][-1])
    return found


def test_many_chunks_go_through_the_tower_in_several_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loader.load(str(make_ultravox(tmp_path)), device="cpu")
    model = loaded.model
    assert isinstance(model, UltravoxModel)
    assert loaded.processor is not None
    items = [
        loaded.processor.process("audio", sound(length), {}) for length in (161, 66_011, 40_000)
    ]
    whole, tower = model.encode(items), model.tower
    calls: list[int] = []

    def counted(stretches: Sequence[MelChunk]) -> list[torch.Tensor]:
        assert tower is not None
        calls.append(sum(len(stretch.mel) for stretch in stretches))
        return tower(stretches)

    monkeypatch.setattr(model, "tower", counted)
    monkeypatch.setattr("sensorium.models.families.ultravox.model.MAX_FRAMES", 250)
    for found, expected in zip(model.encode(items), whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 4
    assert max(calls) <= 250


@pytest.mark.parametrize("newer", [True, False], ids=["v0.5", "v0.3"])
@pytest.mark.parametrize("layout", ["hub", "embedded", "ids"])
def test_parity(tmp_path: Path, layout: str, newer: bool) -> None:
    folder = make_ultravox(tmp_path, layout=layout, newer=newer, seed=3 + newer)
    assert_parity(folder, CASES)


@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen2", "qwen3"])
@pytest.mark.parametrize("layout", ["hub", "embedded"])
def test_other_text_families(tmp_path: Path, family: str, layout: str) -> None:
    folder = make_ultravox(tmp_path, layout=layout, text_family=family)
    assert_parity(folder, CASES[1:2])


@pytest.mark.parametrize("tower", ["audio_tower.model.encoder.", "model.encoder."])
def test_other_names_of_the_encoder(tmp_path: Path, tower: str) -> None:
    assert_parity(make_ultravox(tmp_path, tower=tower), CASES[1:2])


def test_thirty_second_chunks(tmp_path: Path) -> None:
    """Full chunks of the published size are 187.5 embeddings long; the 188th is filled up."""
    folder = make_ultravox(tmp_path, audio={"max_source_positions": 1500, "encoder_layers": 1})
    harness, plain = Harness(loader.load(str(folder), device="cpu")), PlainUltravox(folder)
    sounds = [sound(31 * RATE), sound(RATE), sound(29 * RATE + 7)]
    features = harness.process(sounds)
    assert [item.num_embeds for item in features] == [195, 7, 182]
    with torch.inference_mode():
        found = harness.model.encode(features)
    for own, item in zip(found, sounds, strict=True):
        torch.testing.assert_close(own, plain.embeds(item.samples), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("newer", [True, False], ids=["v0.5", "v0.3"])
def test_features_and_counts_of_fifty_lengths(tmp_path: Path, newer: bool) -> None:
    processor = loader.load(str(make_ultravox(tmp_path, newer=newer)), device="cpu").processor
    plain, rng = PlainUltravox(tmp_path), np.random.default_rng(newer)
    assert processor is not None
    lengths = [1, 159, 160, 161, 320, 31_999, 32_000, 32_001, *rng.integers(300, 70_000, 42)]
    for length in map(int, lengths):
        features = processor.process("audio", sound(length), {})
        mel = features.arrays["mel"]
        assert features.num_embeds == plain.num_tokens(max(length, 320))
        np.testing.assert_allclose(mel.T, plain.features(sound(length).samples), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(tmp_path: Path, dtype: str) -> None:
    folder = make_ultravox(tmp_path, dtype=dtype)
    harness = Harness(loader.load(str(folder), device="cpu", dtype=dtype))
    exact = PlainUltravox(folder).embeds(sound(66_011).samples)
    with torch.inference_mode():
        (found,) = harness.model.encode(harness.process([sound(66_011)]))
    error = (found.float() - exact).abs().mean() / exact.abs().mean()
    assert error < (0.03 if dtype == "bfloat16" else 0.005), error


def test_the_sound_decides_the_answer(tmp_path: Path) -> None:
    """Guards the other tests: if this checkpoint ignored sounds, parity would show nothing."""
    folder = make_ultravox(tmp_path)
    harness = Harness(loader.load(str(folder), device="cpu"))
    answers = {
        tuple(harness.greedy(start(harness, folder, (AUDIO, [length])), 8))
        for length in (4000, 4001, 9000, 20_000, 40_000, 50_000)
    }
    assert len(answers) >= 5
