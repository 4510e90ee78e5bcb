"""Rotary factors against transformers' for every scaling that checkpoints declare."""

from __future__ import annotations

import pytest
import torch

from sensorium.layers.rotary import Rotary, axial_cos_sin, axis_of_frequency

DIM, THETA, MAX_POSITION = 32, 10000.0, 4096
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "beta_fast": 16,
        "truncate": False,
        "original_max_position_embeddings": 1024,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(DIM // 2)],
        "long_factor": [2.0 + i for i in range(DIM // 2)],
        "original_max_position_embeddings": 512,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


def theirs(scaling: dict, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        head_dim=DIM,
        max_position_embeddings=MAX_POSITION,
        rope_parameters={"rope_theta": THETA, **scaling},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    return cos[0, :, : DIM // 2], sin[0, :, : DIM // 2]


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("longest", [400, 4000])
def test_factors_equal_transformers(name, longest):
    positions = torch.tensor([0, 1, 17, longest // 2, longest - 1])
    rotary = Rotary(DIM, THETA, SCALINGS[name], MAX_POSITION)
    length = longest if longest > 512 else 0
    for own, expected in zip(
        rotary.cos_sin(positions, [(length, 5)]), theirs(SCALINGS[name], positions), strict=True
    ):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=2e-5)


def test_dynamic_scales_for_the_length_of_the_sequence():
    positions = torch.tensor([0, 9, 8191])
    rotary = Rotary(DIM, THETA, SCALINGS["dynamic"], MAX_POSITION)
    expected = theirs(SCALINGS["dynamic"], positions)
    torch.testing.assert_close(
        rotary.cos_sin(positions, [(8192, 3)]), expected, rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_sequences_of_different_lengths_in_one_batch_have_the_bits_of_each_alone(name):
    rotary = Rotary(DIM, THETA, SCALINGS[name], MAX_POSITION)
    runs = [(0, 3), (5000, 2), (0, 1), (8192, 4)]
    positions = [torch.arange(7, 7 + num_rows) for _, num_rows in runs]
    found = rotary.cos_sin(torch.cat(positions), runs)
    alone = [rotary.cos_sin(rows, [run]) for rows, run in zip(positions, runs, strict=True)]
    for batch, parts in zip(found, zip(*alone, strict=True), strict=True):
        assert torch.equal(batch, torch.cat(parts))
    assert torch.equal(found[0][:3], rotary.cos_sin(positions[0])[0])
    assert not torch.equal(found[0][3:5], rotary.cos_sin(positions[1])[0])


def test_su_is_longrope_and_short_unless_told_otherwise():
    su = {**SCALINGS["longrope"], "type": "su"}
    del su["rope_type"]
    own = Rotary(DIM, THETA, su, MAX_POSITION).cos_sin(torch.arange(9))
    short = Rotary(DIM, THETA, SCALINGS["longrope"], MAX_POSITION)
    torch.testing.assert_close(own, short.cos_sin(torch.arange(9)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_three_axes_equal_transformers(interleaved):
    section = [8, 4, 4] if not interleaved else [6, 5, 5]
    parameters = {"rope_type": "default", "rope_theta": THETA, "mrope_section": section}
    positions = torch.randint(0, 500, (3, 20))
    if interleaved:
        from transformers import Qwen3VLTextConfig as Config
        from transformers.models.qwen3_vl.modeling_qwen3_vl import (
            Qwen3VLTextRotaryEmbedding as Theirs,
        )
    else:
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig as Config
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding as Theirs
    config = Config(hidden_size=4 * DIM, num_attention_heads=4, head_dim=DIM)
    config.head_dim = DIM
    config.rope_parameters = parameters
    expected = Theirs(config)(torch.zeros(1), positions[:, None])
    own = Rotary(DIM, THETA, {**parameters, "mrope_interleaved": interleaved}, MAX_POSITION)
    for mine, other in zip(own.cos_sin(positions), expected, strict=True):
        torch.testing.assert_close(mine, other[0, :, : DIM // 2], rtol=1e-5, atol=1e-5)
    same = own.cos_sin(positions[:1].expand(3, -1))
    torch.testing.assert_close(own.cos_sin(positions[0]), same)


def test_three_equal_axes_without_sections_count_as_one():
    rotary = Rotary(DIM, THETA)
    positions = torch.arange(5).expand(3, -1)
    torch.testing.assert_close(rotary.cos_sin(positions), rotary.cos_sin(positions[0]))


def test_axes_must_cover_the_frequencies():
    assert axis_of_frequency([2, 1, 1], 4, interleaved=False).tolist() == [0, 0, 1, 2]
    assert axis_of_frequency([2, 1, 1], 4, interleaved=True).tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="sum to 5"):
        axis_of_frequency([2, 1, 1], 5, interleaved=False)


def test_unknown_types_and_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="unknown rope type 'cubic'"):
        Rotary(DIM, THETA, {"rope_type": "cubic"})
    scaling = {**SCALINGS["longrope"], "short_factor": [1.0]}
    with pytest.raises(ValueError, match="short_factor has 1 entries, expected 16"):
        Rotary(DIM, THETA, scaling, MAX_POSITION)


def test_axial_factors_put_rows_before_columns():
    cos, sin = axial_cos_sin(torch.tensor([[0, 3], [2, 0]]), 16)
    assert cos.shape == sin.shape == (2, 8)
    assert torch.equal(cos[0, :4], torch.ones(4))
    assert torch.equal(sin[1, 4:], torch.zeros(4))
    torch.testing.assert_close(sin[0, 4], torch.tensor(3.0).sin())
    torch.testing.assert_close(sin[1, 1], torch.tensor(2.0 * 10000 ** (-2 / 8)).sin())
