"""Tokenizer, layouts of sequences and labels, and the training model against transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from training.batches import (
    IGNORED,
    MAX_LENGTH,
    NO_MATCH,
    Encoder,
    layout,
    make_batch,
    patch_labels,
)
from training.export import export, published_weights, training_weights
from training.learner import Learner, attention_mask, normalise
from training.model import DemoModel, Shape
from training.optimizer import orthogonalize
from training.picture import Turn
from training.pictures import draw_picture
from training.tokenizer import random_text
from training.train import as_tensors, rate_at

TURNS = [Turn("colour", "What color is it?", "red"), Turn("word", "Read the text.", "CAT")]


@pytest.fixture(scope="module")
def encode() -> Encoder:
    return Encoder()


def test_tokenizer_loses_nothing(encode: Encoder) -> None:
    rng = Random(1)
    for _ in range(200):
        text = random_text(rng, 20)
        assert encode.decode(encode(text)) == text


def test_question_words_are_whole_and_read_words_are_spelled(encode: Encoder) -> None:
    assert len(encode("What color is the red circle?")) == 7
    assert len(encode("CAT")) == 3
    assert len(encode("42")) == 2
    assert len(encode("<|im_end|>")) == 1


@pytest.mark.parametrize("way", ["packed", "question_first", "talk"])
def test_labels_spell_the_answers(encode: Encoder, way: str) -> None:
    sequence = layout(Random(0), encode, (4, 5), TURNS, way)
    labels = [label for label in sequence.labels if label != IGNORED]
    assert labels == encode("red<|im_end|>") + encode("CAT<|im_end|>")
    assert sequence.kinds == ["colour", "word"]
    pictures = 2 if way == "question_first" else 1
    assert sequence.ids.count(encode.image_pad) == 20 * pictures


def test_packed_questions_start_at_one_position(encode: Encoder) -> None:
    sequence = layout(Random(0), encode, (4, 5), TURNS, "packed")
    segments, positions = np.array(sequence.segments), np.array(sequence.positions)
    first, second = (positions[segments == number][0] for number in (1, 2))
    assert (first == second).all()
    # Text goes on at the picture's start plus its longer side.
    picture = np.array(sequence.image_index) >= 0
    assert positions[segments == 0][-1, 0] == positions[picture].min() + 5
    assert (positions[picture][7] - positions[picture][0]).tolist() == [0, 1, 2]


def test_too_long_turns_are_left_out(encode: Encoder) -> None:
    turns = [Turn("word", "Read the text.", "X" * 150), TURNS[0]]
    sequence = layout(Random(0), encode, (4, 5), turns, "packed")
    assert sequence.kinds == ["colour"]
    assert len(sequence.ids) <= MAX_LENGTH


def test_mask_hides_other_questions() -> None:
    mask = attention_mask(torch.tensor([[0, 0, 1, 1, 2]]))[0, 0] == 0
    assert mask.tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, True, True, False],
        [True, True, False, False, True],
    ]


def test_points_stand_before_the_answers(encode: Encoder) -> None:
    turn = Turn("position", "Is it left of the star?", "yes", ((0.1, 0.9), (0.99, 0.5)))
    sequence = layout(Random(0), encode, (4, 5), [turn], "packed")
    marked = [i for i, points in enumerate(sequence.points) if points[0] >= 0]
    assert marked == [i for i, label in enumerate(sequence.labels) if label >= 0][:1]
    assert sequence.points[marked[0]] == (1, 7, 9, 4)
    assert sequence.matches[marked[0]] == (15, 14, -1, -1, -1, -1)


def test_matches_are_the_counted_things(encode: Encoder) -> None:
    turns = [
        Turn("count", "How many stars?", "1", counted=((0.5, 0.1),)),
        Turn("count", "How many hearts?", "0", counted=()),
        Turn("describe", "What is it?", "a star"),
    ]
    sequence = layout(Random(0), encode, (4, 5), turns, "packed")
    asked = [matches for matches in sequence.matches if matches[0] != IGNORED]
    assert asked == [(2, -1, -1, -1, -1, -1), (-1,) * 6]


def test_patch_labels_lie_where_things_are() -> None:
    picture = draw_picture(8, "shapes", (280, 280))
    labels = patch_labels(picture.regions, picture.image.size, (5, 5))
    assert labels.shape == (4, 100)
    assert (labels[0] > 0).any()
    assert (labels[3] > 0).sum() == len(picture.regions)
    assert ((labels[0] > 0) == (labels[1] > 0)).all()


def test_batches_are_deterministic(encode: Encoder) -> None:
    first, second = make_batch(encode, 7, 3), make_batch(encode, 7, 3)
    assert all(np.array_equal(first[key], second[key]) for key in ("pixels", "ids", "labels"))


def test_rate_rises_stays_and_falls() -> None:
    assert rate_at(0.0, 0) < 0.02
    assert rate_at(0.3, 1000) == pytest.approx(1.0)
    assert rate_at(1.0, 5000) == pytest.approx(0.02)


def test_orthogonalize_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 32, 64), (2, 64, 32)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_logits_equal_those_of_transformers(encode: Encoder, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    shape = dataclasses.replace(Shape(), vision_layers=2, layers=2)
    model = DemoModel(shape)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.load_state_dict(training_weights(published_weights(model.state_dict())))
    export(model.state_dict(), shape, tmp_path)
    reference = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)

    picture = draw_picture(11, "shapes", (150, 110))
    sequence = layout(Random(0), encode, (4, 5), picture.turns[:2], "talk")
    pixels = np.array(picture.image.resize((140, 112), 3))[None]
    ids = torch.tensor([sequence.ids])
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(
        images=[picture.image], return_tensors="pt"
    )
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 10]]
    with torch.no_grad():
        expected = reference(
            input_ids=ids, attention_mask=torch.ones_like(ids),
            mm_token_type_ids=torch.eq(ids, encode.image_pad).int(), **inputs,
        ).logits  # fmt: skip
        tokens, _ = model.visual(normalise(as_tensors({"pixels": pixels})["pixels"]))
        hidden, _ = model.hidden(
            ids,
            torch.tensor(sequence.positions).T[:, None],
            torch.tensor([sequence.image_index]),
            attention_mask(torch.tensor([sequence.segments])).float(),
            tokens,
        )
    torch.testing.assert_close(model.logits(hidden), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["packed", "question_first", "talk"])
def test_the_pointer_loss_looks_at_the_image_tokens_of_its_question(way: str) -> None:
    torch.manual_seed(0)
    batch = as_tensors(make_batch(Encoder(), 5, 4, {"shapes": 1.0}, way))
    learner = Learner(Shape())
    matches, segments = batch["matches"], batch["segments"]
    rows, ends = (matches[..., 0] != IGNORED).nonzero(as_tuple=True)
    row, end = int(rows[0]), int(ends[0])
    batch["matches"] = torch.full_like(matches, IGNORED)
    batch["matches"][row, end] = matches[row, end]
    hidden = torch.randn(*segments.shape, 256)
    whole = learner._pointer_loss(batch, hidden)
    own = int(segments[row, end])
    seen = (batch["image_index"][row] >= 0) & ((segments[row] == own) | (segments[row] == 0))
    others = torch.ones(segments.shape, dtype=torch.bool)
    others[row] = ~seen
    others[row, end] = False
    changed = torch.where(others[..., None], torch.randn_like(hidden), hidden)
    assert torch.equal(learner._pointer_loss(batch, changed), whole)
    # Bringing the shown token of a match nearer to what is asked must help, of any other token
    # hurt.
    asked = learner.asked(hidden[row, end])
    towards = torch.linalg.lstsq(learner.shown.weight, asked[:, None]).solution[:, 0]
    for place in seen.nonzero()[:, 0].tolist():
        nearer = hidden.clone()
        nearer[row, place] += towards
        matching = bool((batch["image_index"][row, place] == matches[row, end]).any())
        assert (learner._pointer_loss(batch, nearer) < whole) == matching


def test_the_pointer_loss_of_nothing() -> None:
    batch = as_tensors(make_batch(Encoder(), 5, 2, {"shapes": 1.0}, "packed"))
    learner = Learner(Shape())
    hidden = torch.randn(*batch["segments"].shape, 256)
    none = batch["matches"][..., 0] != IGNORED
    batch["matches"][none] = NO_MATCH
    assert learner._pointer_loss(batch, hidden).isfinite()
    batch["matches"][:] = IGNORED
    assert learner._pointer_loss(batch, hidden) == 0
