"""Sounds: what is heard in them is what their answers say; features, sequences and logits."""

from __future__ import annotations

import dataclasses
import shutil
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from training.audio_batches import (
    MAX_LENGTH,
    AudioEncoder,
    event_labels,
    layout,
    log_mel,
    make_sounds,
)
from training.audio_export import export, published_weights
from training.audio_model import AudioDemoModel, AudioShape, token_counts
from training.audio_train import AudioLearner
from training.batches import IGNORED
from training.learner import attention_mask, measure
from training.picture import Turn
from training.sounds import EVENTS, LONGEST, SCENES, Sound, draw_sound, small_talk
from training.speech import (
    DIGITS,
    HELD_OUT_ESPEAK,
    HELD_OUT_FLITE,
    RATE,
    WORDS,
    Speech,
    SynthesiserError,
    espeak,
    resample,
    settings,
)

TURNS = [Turn("word", "Which word is spoken?", "red"), Turn("digit", "Which digit?", "7")]


@pytest.fixture(scope="module")
def encode() -> AudioEncoder:
    return AudioEncoder()


def answers(sound: Sound, kind: str) -> set[str]:
    return {turn.answer for turn in sound.turns if turn.kind == kind}


def pitch_of(samples: np.ndarray) -> float:
    """The strongest frequency in Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * RATE / len(samples))


@pytest.mark.parametrize("seed", range(30))
def test_tones_go_where_the_answer_says(speech: Speech, seed: int) -> None:
    sound = draw_sound(seed, speech, "tone")
    (event,) = sound.events
    (direction,) = answers(sound, "describe")
    assert direction == f"a {event.name} tone"
    tone = sound.samples[event.start : event.stop]
    fifth = len(tone) // 5
    # Far below the tone there is only noise: its strongest frequency is that of the tone.
    first, last = pitch_of(tone[:fifth]), pitch_of(tone[-fifth:])
    low, high = {"rising": (1.05, 99), "falling": (0.0, 0.95), "steady": (0.97, 1.03)}[event.name]
    assert low < last / first < high or np.log2(last / first) % 1 < 0.06  # an overtone stronger


@pytest.mark.parametrize("seed", range(30))
def test_beeps_are_as_many_as_the_answer_says(speech: Speech, seed: int) -> None:
    sound = draw_sound(seed, speech, "beeps")
    counts = {turn.answer for turn in sound.turns if turn.kind == "beeps" and turn.answer.isdigit()}
    assert counts == {str(len(sound.events))}
    ends = [at for event in sound.events for at in (event.start, event.stop)]
    assert ends == sorted(ends)
    assert ends[-1] <= len(sound.samples) <= LONGEST * RATE


def test_words_are_those_that_were_said(speech: Speech) -> None:
    for seed in range(40):
        sound = draw_sound(seed, speech, "digits", "flite")
        words = [event.name for event in sound.events]
        assert answers(sound, "digits") == {" ".join(str(DIGITS.index(word)) for word in words)}
        for event in sound.events:
            # Played at most 14 % faster or 12 % slower than the fixture's tone.
            frequency = 200 + 40 * WORDS.index(event.name)
            found = pitch_of(sound.samples[event.start : event.stop])
            assert 0.87 < found / frequency < 1.15
        sound = draw_sound(seed, speech, "word")
        assert answers(sound, "word") == {sound.events[0].name}
        assert answers(sound, "describe") == {f"a voice saying {sound.events[0].name}"}


def test_sounds_are_deterministic_and_of_all_kinds(speech: Speech) -> None:
    first, second = draw_sound(9, speech), draw_sound(9, speech)
    assert first.turns == second.turns
    assert np.array_equal(first.samples, second.samples)
    drawn = [draw_sound(seed, speech) for seed in range(150)]
    assert {e.name for sound in drawn for e in sound.events} > {"rising", "beep", "seven", "hello"}
    assert {a for sound in drawn for a in answers(sound, "source")} >= {
        "noise",
        "nothing",
        "a tone",
    }
    assert all(np.abs(sound.samples).max() <= 1 for sound in drawn)
    assert sum(SCENES.values()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="song"):
        draw_sound(1, speech, "song")
    assert {small_talk(Random(seed)).kind for seed in range(20)} == {"small_talk"}


def test_voices_kept_out_are_not_in_training() -> None:
    for speaker, name, arguments in settings(Random(1), 200):
        unknown = arguments[0] in HELD_OUT_FLITE or any(
            arguments[0].endswith("+" + voice) for voice in HELD_OUT_ESPEAK
        )
        accent = arguments[0].startswith("en-gb-scotland")
        assert (unknown or accent) == (speaker != "trained")
        assert name == ("flite" if "+" not in arguments[0] else "espeak")


def test_a_synthesiser_that_is_missing_or_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SynthesiserError, match="espeak-ng"):
        espeak("seven", "en-us", 150, 50)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_espeak_speaks_at_the_right_rate() -> None:
    slow, fast = espeak("seven", "en-us+m3", 110, 50), espeak("seven", "en-us+m3", 220, 50)
    assert 0.2 * RATE < len(fast) < len(slow) < 1.5 * RATE


def test_resampling_keeps_the_pitch() -> None:
    time = np.arange(8000) / 8000
    louder = resample(np.sin(2 * np.pi * 440 * time).astype(np.float32), 8000, 16000)
    assert len(louder) == 16000
    assert pitch_of(louder) == pytest.approx(440, abs=2)
    assert np.abs(louder).max() == pytest.approx(1.0, abs=0.05)


def test_features_equal_those_of_transformers() -> None:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=80)
    rng = np.random.default_rng(0)
    for count in (8000, 12345, 16001):
        samples = rng.standard_normal(count).astype(np.float32) * 0.1
        expected = extractor(samples, sampling_rate=RATE, padding="longest", truncation=False,
                             pad_to_multiple_of=160, return_tensors="np")  # fmt: skip
        torch.testing.assert_close(
            log_mel(samples), torch.from_numpy(expected["input_features"][0]), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("way", ["packed", "question_first", "talk"])
def test_labels_spell_the_answers(encode: AudioEncoder, way: str) -> None:
    sequence = layout(Random(0), encode, 9, TURNS, way)
    labels = [label for label in sequence.labels if label != IGNORED]
    spelled = encode.decode(labels)
    assert "red" in spelled
    assert spelled.endswith("7")
    sounds = len([k for k in sequence.kinds if k != "small_talk"]) if way == "question_first" else 1
    assert sequence.ids.count(encode.audio) == 9 * sounds
    segments, positions = np.array(sequence.segments), np.array(sequence.positions)
    if way == "packed":
        assert positions[segments == 1][0] == positions[segments == 2][0]
    long = layout(Random(0), encode, 9, [TURNS[0]._replace(answer="x" * 200), TURNS[1]], "packed")
    assert long.kinds == ["digit"]
    assert len(long.ids) <= MAX_LENGTH


def test_events_are_marked_when_they_sound() -> None:
    from training.sounds import Event

    events = [Event("beep", 1600, 3200), Event("beep", 4800, 6400)]
    sounding, begun = event_labels(Sound(np.zeros(8000), [], events), 25)
    assert (sounding == EVENTS.index("beep")).nonzero()[0].tolist() == [
        *range(5, 10),
        *range(15, 20),
    ]
    assert begun.tolist() == [0] * 5 + [1] * 10 + [2] * 10


def test_batches_hold_sounds_of_like_length(encode: AudioEncoder, speech: Speech) -> None:
    batches = make_sounds(encode, speech, 3, 6, 3)
    spans = sorted((int(b["lengths"].min()), int(b["lengths"].max())) for b in batches)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    again = make_sounds(encode, speech, 3, 6, 3)
    assert all(
        torch.equal(a["features"], b["features"]) for a, b in zip(batches, again, strict=True)
    )
    batch = batches[0]
    audio = (batch["audio_index"].max(1).values + 1).tolist()
    assert audio == token_counts(batch["lengths"]).tolist()
    learner = AudioLearner(AudioShape())
    _, _, heads = learner(batch)
    assert heads.isfinite()
    assert set(measure(learner, [batch])) == {k for kinds in batch["kinds"] for k in kinds}


def test_logits_equal_those_of_whisper_and_llama(
    encode: AudioEncoder, speech: Speech, tmp_path: Path
) -> None:
    """Three sounds of different lengths in a batch, against transformers' parts, one by one."""
    from safetensors.torch import load_file

    torch.manual_seed(0)
    shape = dataclasses.replace(AudioShape(), audio_layers=2, layers=2, positions=200)
    model = AudioDemoModel(shape)
    for name, weight in model.named_parameters():
        if "embed_positions" not in name:
            weight.data += 0.05 * torch.randn_like(weight)
    model.load_state_dict({k: v.float() for k, v in published_weights(model.state_dict()).items()})
    export(model.state_dict(), shape, tmp_path)
    weights = {k: v.float() for k, v in load_file(tmp_path / "model.safetensors").items()}
    sounds = [draw_sound(seed, speech) for seed in (1, 2, 5)]
    features = [log_mel(sound.samples) for sound in sounds]
    lengths = torch.tensor([row.shape[1] for row in features])
    assert len(set(lengths.tolist())) == 3
    padded = torch.zeros(3, 80, -(-int(lengths.max()) // 16) * 16)
    for i, row in enumerate(features):
        padded[i, :, : row.shape[1]] = row
    with torch.no_grad():
        tokens, _ = model.listen(padded, lengths)
        for i, sound in enumerate(sounds):
            count = int(token_counts(lengths[i : i + 1]))
            sequence = layout(Random(i), encode, count, sound.turns[:2], "talk")
            hidden, _ = model.hidden(
                torch.tensor([sequence.ids]), torch.tensor([sequence.positions]),
                torch.tensor([sequence.audio_index]),
                attention_mask(torch.tensor([sequence.segments])).float(), tokens[i : i + 1],
            )  # fmt: skip
            expected = reference_logits(tmp_path, weights, features[i], sequence)
            torch.testing.assert_close(model.logits(hidden), expected, atol=2e-4, rtol=1e-4)


def reference_logits(folder: Path, weights: dict[str, torch.Tensor], features: torch.Tensor,
                     sequence) -> torch.Tensor:  # type: ignore[no-untyped-def]  # fmt: skip
    """Logits of one sequence: WhisperEncoder, the projector from its formula, LlamaForCausalLM."""
    import json

    from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = json.loads((folder / "config.json").read_text())
    encoder = WhisperEncoder(WhisperConfig(**config["audio_config"])).eval()
    own = {k.removeprefix("audio_tower."): v for k, v in weights.items() if "audio_tower" in k}
    encoder.load_state_dict(own)
    # Its forward takes sounds of one length only, so its parts are called one by one.
    x = torch.nn.functional.gelu(encoder.conv1(features[None]))
    x = torch.nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        found = layer(x, None)
        x = found if isinstance(found, torch.Tensor) else found[0]
    heard = encoder.layer_norm(x)[0]
    stacked = torch.nn.functional.pad(heard, (0, 0, 0, -len(heard) % 8)).view(
        -1, 8 * heard.shape[1]
    )

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale = weights[f"multi_modal_projector.{name}.weight"]
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale

    value, gate = (
        norm(stacked, "ln_pre") @ weights["multi_modal_projector.linear_1.weight"].T
    ).chunk(2, -1)
    inner = norm(torch.sigmoid(gate) * gate * value, "ln_mid")
    embeds = inner @ weights["multi_modal_projector.linear_2.weight"].T
    llama = LlamaForCausalLM(LlamaConfig(**config["text_config"])).eval().float()
    own = {
        k.removeprefix("language_model."): v for k, v in weights.items() if "language_model" in k
    }
    missing, unexpected = llama.load_state_dict(own, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    llama.tie_weights()
    x = llama.model.embed_tokens(torch.tensor(sequence.ids))
    audio_at = torch.tensor(sequence.audio_index)
    x[audio_at >= 0] = embeds
    return llama(inputs_embeds=x[None]).logits
