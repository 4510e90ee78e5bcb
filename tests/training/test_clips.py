"""Clips: what happens in them is what their answers say, and the training model takes them rightly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from training.batches import IGNORED, Encoder, layout
from training.clip_batches import clip_labels, make_clips
from training.clips import CLIP_GRIDS, CLIP_MAX_PIXELS, CLIP_MIN_PIXELS, EVENTS, Clip, draw_clip
from training.export import export, published_weights, training_weights
from training.learner import Learner, attention_mask, measure, normalise
from training.model import DemoModel, Shape
from training.picture import Turn
from training.train import as_tensors

SIDES = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}


@pytest.fixture(scope="module")
def encode() -> Encoder:
    return Encoder()


def answers(clip: Clip, kind: str) -> list[str]:
    return [turn.answer for turn in clip.turns if turn.kind == kind]


def boxes(clip: Clip, frame: int) -> dict[str, tuple[float, float, float, float]]:
    return {f"{r.colour} {r.shape}": r.box for r in clip.regions[frame]}


@pytest.mark.parametrize("seed", range(40))
def test_what_moves_moves_that_way_and_nothing_else_does(seed: int) -> None:
    clip = draw_clip(seed, "moves", (168, 112))
    first, last = boxes(clip, 0), boxes(clip, -1)
    (sentence,) = answers(clip, "happens")
    moved = {name for name in first if first[name] != last[name]}
    name, direction = sentence.removeprefix("the ").split(" moves ")
    assert moved == {name}
    axis, sign = SIDES[direction]
    steps = [
        (boxes(clip, i)[name][axis] - first[name][axis]) * sign for i in range(len(clip.frames))
    ]
    assert steps == sorted(steps)
    assert steps[-1] > 0.2 * (168, 112)[axis]
    assert set(answers(clip, "motion_where")) == {direction}
    sideways = abs(last[name][1 - axis] - first[name][1 - axis])
    assert sideways < steps[-1]


@pytest.mark.parametrize(("event", "verb"), [("appears", "appears"), ("disappears", "disappears")])
def test_what_appears_was_not_there(event: str, verb: str) -> None:
    for seed in range(20):
        clip = draw_clip(seed, event)
        (sentence,) = answers(clip, "happens")
        name = " ".join(sentence.split()[1:3])
        assert sentence.endswith(verb)
        assert (name in boxes(clip, 0)) == (event == "disappears")
        assert (name in boxes(clip, -1)) == (event == "appears")
        counts = {turn.answer for turn in clip.turns if turn.kind == "clip_count"}
        assert counts == {str(len(boxes(clip, i))) for i in (0, -1)}


def test_colours_and_sizes_change_as_told() -> None:
    for seed in range(20):
        clip = draw_clip(seed, "turns")
        (sentence,) = answers(clip, "happens")
        _, shape, _, _, old, _, new = sentence.split()
        assert f"{old} {shape}" in boxes(clip, 0)
        assert f"{new} {shape}" in boxes(clip, -1)
        clip = draw_clip(seed, "grows")
        (sentence,) = answers(clip, "happens")
        _, colour, shape, verb = sentence.split()
        left, _, right, _ = boxes(clip, 0)[f"{colour} {shape}"]
        other_left, _, other_right, _ = boxes(clip, -1)[f"{colour} {shape}"]
        assert (other_right - other_left > 1.5 * (right - left)) == (verb == "grows")


def test_in_a_still_clip_all_frames_are_equal() -> None:
    clip = draw_clip(3, "still", frames=6)
    assert len(clip.frames) == 6
    assert all(np.array_equal(frame, clip.frames[0]) for frame in clip.frames)
    assert answers(clip, "happens") == ["nothing"]


def test_clips_are_deterministic_and_unknown_events_are_refused() -> None:
    first, second = draw_clip(5), draw_clip(5)
    assert first.turns == second.turns
    assert all(np.array_equal(a, b) for a, b in zip(first.frames, second.frames, strict=True))
    with pytest.raises(ValueError, match="dances"):
        draw_clip(5, "dances")
    assert {draw_clip(seed).turns[0].kind for seed in range(60)} >= {"motion_where", "turn", "grow"}
    assert sum(EVENTS.values()) == pytest.approx(1.0)


def test_positions_of_a_clip_go_on_after_its_longest_axis(encode: Encoder) -> None:
    turn = Turn("motion_where", "Where does it move?", "left", ((0.9, 0.5), (0.1, 0.5)),
                track=((0, 0.9, 0.5), (3, 0.1, 0.5)))  # fmt: skip
    sequence = layout(Random(0), encode, (2, 3), [turn], "packed", 4)
    positions, index = np.array(sequence.positions), np.array(sequence.image_index)
    clip = positions[index >= 0]
    assert len(clip) == 4 * 6
    assert (clip[7] - clip[0]).tolist() == [1, 0, 1]
    assert (clip[-1] - clip[0]).tolist() == [3, 1, 2]
    assert positions[index >= 0].max() + 1 == positions[index.argmax() + 1, 0]
    assert sequence.ids.count(encode.video_pad) == 24
    assert encode.image_pad not in sequence.ids
    (marked,) = [m for m in sequence.matches if m[0] != IGNORED]
    assert marked == (5, 18 + 3, -1, -1, -1, -1)


def test_batches_of_clips_have_labels_for_each_pair(encode: Encoder) -> None:
    batch = make_clips(encode, 3, 4)
    _, frames, height, width, _ = batch["pixels"].shape
    assert (height // 28, width // 28) in CLIP_GRIDS
    assert batch["patches"].shape == (4, frames // 2, 4, height * width // 196)
    assert (batch["image_index"].max(1) + 1 == frames // 2 * height * width // 784).all()
    clip = draw_clip(8, "moves", (84, 84), 4)
    labels = clip_labels(clip, (3, 3))
    assert (labels[:, 3] > 0).sum() == 2 * len(clip.regions[0])
    learner = Learner(Shape())
    _, _, heads = learner(as_tensors(batch))
    assert heads.isfinite()
    assert set(measure(learner, [as_tensors(batch)])) == {
        k for kinds in batch["kinds"] for k in kinds
    }


def test_logits_of_a_clip_equal_those_of_transformers(encode: Encoder, tmp_path: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    shape = dataclasses.replace(Shape(), vision_layers=2, layers=2)
    model = DemoModel(shape)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.load_state_dict(training_weights(published_weights(model.state_dict())))
    export(model.state_dict(), shape, tmp_path)
    reference = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)

    clip = draw_clip(11, "moves", (112, 84), 6)
    sequence = layout(Random(0), encode, (3, 4), clip.turns[:2], "talk", 3)
    pixels = normalise(torch.from_numpy(np.stack([np.array(f) for f in clip.frames])[None]))
    ids = torch.tensor([sequence.ids])
    # Rows of 3 colours, 2 frames, 14 by 14 pixels; the four patches of a cell side by side.
    rows = pixels.reshape(3, 3, 2, 3, 2, 14, 4, 2, 14).permute(0, 3, 6, 4, 7, 1, 2, 5, 8)
    positions = torch.tensor(sequence.positions).T[:, None]
    with torch.no_grad():
        expected = reference(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions,
            mm_token_type_ids=2 * torch.eq(ids, encode.video_pad).int(),
            pixel_values_videos=rows.reshape(-1, 3 * 2 * 14 * 14),
            video_grid_thw=torch.tensor([[3, 6, 8]]),
        ).logits  # fmt: skip
        tokens, _ = model.visual(pixels)
        hidden, _ = model.hidden(
            ids, positions, torch.tensor([sequence.image_index]),
            attention_mask(torch.tensor([sequence.segments])).float(), tokens.view(1, 36, -1),
        )  # fmt: skip
    torch.testing.assert_close(model.logits(hidden), expected, atol=2e-4, rtol=1e-4)


def test_frames_are_resized_as_the_generator_thinks() -> None:
    from sensorium.models.families.qwen2_vl.sizes import PixelRange, target_size

    limits = PixelRange(CLIP_MIN_PIXELS, CLIP_MAX_PIXELS)
    for size, grid in (((84, 84), (3, 3)), ((640, 480), (3, 4)), ((480, 640), (4, 3)),
                       ((500, 500), (3, 3)), ((1920, 1080), (2, 4))):  # fmt: skip
        assert target_size(size[1], size[0], 28, limits) == (grid[0] * 28, grid[1] * 28)
        assert grid in CLIP_GRIDS
