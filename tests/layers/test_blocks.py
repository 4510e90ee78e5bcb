"""Linear layers, norms, embeddings, MLPs and attention blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from sensorium.kernels import ops
from sensorium.kernels.batch import KVCacheLayout
from sensorium.layers import mlp
from sensorium.layers.activation import activation
from sensorium.layers.attention import Attention, VisionAttention
from sensorium.layers.embedding import Embedding, LMHead
from sensorium.layers.linear import Linear
from sensorium.layers.mlp import GatedMLP, PlainMLP
from sensorium.layers.norm import LayerNorm, RMSNorm
from tests.kernels.batches import make_batch

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def fill(layer: Linear, scale: float = 0.2) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = torch.randn(layer.num_outputs, layer.num_inputs) * scale
    bias = torch.randn(layer.num_outputs) if layer.has_bias else None
    layer.load(weight, bias)
    return weight, bias


def test_linear():
    layer = Linear(12, 7, bias=True)
    weight, bias = fill(layer)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias), **CLOSE)
    activated = Linear(12, 7, bias=True, act="relu")
    activated.load(weight, bias)
    torch.testing.assert_close(activated(x), layer(x).relu(), **CLOSE)


@pytest.mark.parametrize("act", [None, "relu"])
def test_linear_before_loading(act):
    with pytest.raises(RuntimeError, match="before its weight was loaded"):
        Linear(3, 2, act=act)(torch.ones(1, 3))


@pytest.mark.parametrize(
    ("bias", "weight_shape", "bias_shape", "message"),
    [
        (False, (3, 2), None, r"shape \(3, 2\), expected \(2, 3\)"),
        (True, (2, 3), None, "needs bias"),
        (False, (2, 3), (2,), "takes no bias"),
        (True, (2, 3), (3,), r"bias has shape \(3,\), expected \(2,\)"),
    ],
)
def test_linear_refuses_what_does_not_fit(bias, weight_shape, bias_shape, message):
    given = None if bias_shape is None else torch.ones(bias_shape)
    with pytest.raises(ValueError, match=message):
        Linear(3, 2, bias).load(torch.ones(weight_shape), given)


def test_norms():
    x, weight, bias = torch.randn(4, 10), torch.rand(10), torch.rand(10)
    norm = RMSNorm(10, 1e-5)
    with pytest.raises(RuntimeError, match="before its weight was loaded"):
        norm(x)
    norm.load(weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (10,), weight, 1e-5), **CLOSE)
    residual = torch.randn(4, 10)
    summed = residual + x
    torch.testing.assert_close(norm.forward_add(residual, x), norm(summed), **CLOSE)
    torch.testing.assert_close(residual, summed)
    layer_norm = LayerNorm(10, 1e-6)
    layer_norm.load(weight, bias)
    torch.testing.assert_close(layer_norm(x), F.layer_norm(x, (10,), weight, bias, 1e-6))
    with pytest.raises(ValueError, match=r"shape \(9,\), expected \(10,\)"):
        norm.load(torch.ones(9))
    with pytest.raises(ValueError, match="needs bias"):
        layer_norm.load(weight)


def test_embedding_and_tied_head():
    table = torch.randn(50, 8)
    embedding, head = Embedding(50, 8), LMHead(50, 8)
    embedding.load(table)
    head.load(embedding.weight)
    ids = torch.tensor([3, 49, 3])
    rows = embedding(ids)
    assert torch.equal(rows, table[ids])
    rows.zero_()  # a step overwrites its embeddings: the table must not notice
    assert embedding.weight[3].abs().sum() > 0
    hidden = torch.randn(4, 8)
    torch.testing.assert_close(head(hidden), hidden @ table.t(), **CLOSE)


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_gated_mlp(act):
    block = GatedMLP(8, 20, act=act)
    both, _ = fill(block.gate_up)
    down, _ = fill(block.down)
    x = torch.randn(3, 8)
    gate, up = (x @ both.t()).chunk(2, dim=-1)
    expected = (activation(act)(gate) * up) @ down.t()
    torch.testing.assert_close(block(x), expected, **CLOSE)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu", "silu"])
def test_plain_mlp(act):
    block = PlainMLP(8, 20, 6, act=act)
    (first, first_bias), (second, second_bias) = fill(block.fc1), fill(block.fc2)
    x = torch.randn(3, 8)
    inner = activation(act)(F.linear(x, first, first_bias))
    torch.testing.assert_close(block(x), F.linear(inner, second, second_bias), **CLOSE)


@pytest.mark.parametrize("make", [lambda: GatedMLP(4, 6), lambda: PlainMLP(4, 6)])
def test_many_rows_go_in_parts_and_come_out_the_same(make, monkeypatch):
    block = make()
    for layer in (
        getattr(block, name) for name in ("gate_up", "down", "fc1", "fc2") if hasattr(block, name)
    ):
        fill(layer)
    x = torch.randn(700, 4)
    whole = block(x)
    widths = []
    monkeypatch.setattr(mlp, "INNER_BYTES", 300 * 4 * 12)
    run = mlp.in_parts

    def counted(run_part, x, width, adapters):
        def noted(part):
            widths.append(len(part))
            return run_part(part)

        return run(noted, x, width, adapters)

    monkeypatch.setattr(mlp, "in_parts", counted)
    torch.testing.assert_close(block(x), whole, **CLOSE)
    assert len(widths) > 1
    assert sum(widths) == 700


def test_unknown_activations_are_refused_when_built():
    with pytest.raises(ValueError, match="unknown activation 'softsign'"):
        PlainMLP(2, 2, act="softsign")
    with pytest.raises(ValueError, match="unknown activation 'softsign'"):
        GatedMLP(2, 2, act="softsign")


def test_decoder_attention_of_a_whole_prompt():
    layer = Attention(24, 4, 2, 16, qkv_bias=True, qk_norm=True, norm_eps=1e-6)
    qkv, bias = fill(layer.qkv)
    out, _ = fill(layer.o)
    assert layer.q_norm is not None
    assert layer.k_norm is not None
    norms = torch.rand(2, 16)
    layer.q_norm.load(norms[0])
    layer.k_norm.load(norms[1])
    batch = make_batch(KVCacheLayout(1, 2, 16, 16, torch.float32), [(30, 30)])
    x = torch.randn(30, 24)
    q, k, v = F.linear(x, qkv, bias).view(1, 30, 8, 16).transpose(1, 2).split((4, 2, 2), dim=1)
    q, k = (F.rms_norm(t, (16,), w, 1e-6) for t, w in zip((q, k), norms, strict=True))
    cos, sin = (torch.cat((t, t), dim=-1) for t in (batch.cos, batch.sin))
    q, k = (t * cos + torch.cat((-t[..., 8:], t[..., :8]), dim=-1) * sin for t in (q, k))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = mixed.transpose(1, 2).reshape(30, 64) @ out.t()
    torch.testing.assert_close(layer(x, batch, 0), expected, **CLOSE)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [3, 5, 5, 1], [9]])
@pytest.mark.parametrize("rotary", [False, True])
def test_vision_attention_keeps_segments_apart(lengths, rotary):
    layer = VisionAttention(16, 2)
    fill(layer.qkv)
    fill(layer.o)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    x = torch.randn(starts[-1], 16)
    factors: list[tuple[torch.Tensor, ...]] = [()] * len(lengths)
    whole: tuple[torch.Tensor, ...] = ()
    if rotary:
        angle = torch.rand(starts[-1], 4)
        whole = (angle.cos(), angle.sin())
        factors = [tuple(t[a:b] for t in whole) for a, b in pairwise(starts)]
    alone = [
        layer(x[a:b], [0, b - a], *own)
        for a, b, own in zip(starts, starts[1:], factors, strict=False)
    ]
    torch.testing.assert_close(layer(x, starts, *whole), torch.cat(alone), **CLOSE)


def test_layers_of_half_precision_round_once():
    x = torch.randn(3, 64).bfloat16()
    layer = Linear(64, 32)
    weight = (torch.randn(32, 64) * 0.1).bfloat16()
    layer.load(weight)
    expected = (x.float() @ weight.float().t()).bfloat16()
    torch.testing.assert_close(layer(x), expected, rtol=2**-7, atol=1e-3)
    assert ops.pack_weight(weight).dtype == torch.bfloat16
