"""Captured decode steps beside the same steps launch by launch: equal bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from numba import types
from numba.core.ccallback import CFunc

from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch, AttentionVariant, KVCacheLayout, LayerCache
from sensorium.kernels.cpu import graph
from sensorium.kernels.cpu.launch import NUM_ARGS
from sensorium.kernels.cpu.linear import floats, levels
from sensorium.kernels.weight import Multiply
from sensorium.layers.attention import Attention
from sensorium.layers.linear import Linear
from sensorium.layers.mlp import GatedMLP
from sensorium.layers.norm import RMSNorm
from sensorium.models.loading import quantize
from tests.kernels.batches import make_batch

HIDDEN, HEADS, KV_HEADS, DIM, LAYERS = 64, 4, 2, 16, 3
FORMS = ("bfloat16", "float16", "float32", "int8", "int4", "int4 in another order")

pytestmark = pytest.mark.skipif(
    not floats.available("float16"), reason="this processor has none of the kernels to capture"
)


class Layers:
    """A few layers of a decoder with random weights in one format."""

    def __init__(self, form: str, window: int | None = None) -> None:
        generator = torch.Generator().manual_seed(11)
        self.dtype = torch.bfloat16 if form.startswith("int") else getattr(torch, form)
        self.layers: list[tuple[Attention, GatedMLP, RMSNorm, RMSNorm]] = []
        for index in range(LAYERS):
            attention = Attention(
                HIDDEN, HEADS, KV_HEADS, DIM, qkv_bias=True, window=window if index else None
            )
            mlp = GatedMLP(HIDDEN, 96)
            for linear in (attention.qkv, attention.o, mlp.gate_up, mlp.down):
                self._load(linear, form, generator)
            first, second = RMSNorm(HIDDEN, 1e-6), RMSNorm(HIDDEN, 1e-6)
            for norm in (first, second):
                norm.load(torch.rand(HIDDEN, generator=generator).to(self.dtype))
            self.layers.append((attention, mlp, first, second))

    def _load(self, linear: Linear, form: str, generator: torch.Generator) -> None:
        shape = (linear.num_outputs, linear.num_inputs)
        weight = torch.randn(shape, generator=generator) / linear.num_inputs**0.5
        if form.startswith("int"):
            packed = ops.pack_weight(getattr(quantize, form[:4])(weight), self.dtype)
            if form.endswith("order"):
                order = torch.randperm(linear.num_inputs, generator=generator).int()
                packed = ops.permuted(packed, order)
        else:
            packed = floats.pack_weight(weight.to(self.dtype))
        bias = torch.rand(linear.num_outputs, generator=generator) if linear.has_bias else None
        linear.forward = packed.bind(bias)

    def __call__(self, embeds: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        x = embeds
        for index, (attention, mlp, first, second) in enumerate(self.layers):
            x = first.forward_add(embeds, x)
            x = second.forward_add(embeds, attention(x, batch, index))
            x = mlp(x)
        return x


class Steps:
    """Decode steps of sequences of some lengths, each a token longer than the one before.

    ``rows``: numbers of rows of the sequences, in steps that try tokens; every second step has them
    the other way round. ``kept``: data type of the cache, if it is another.
    """

    def __init__(
        self,
        lengths: list[int],
        dtype: torch.dtype,
        rows: list[int] | None = None,
        kept: torch.dtype | None = None,
    ) -> None:
        self.rows = rows
        self.generator = torch.Generator().manual_seed(5)
        self.dtype, self.kept = dtype, dtype if kept is None else kept
        layout = KVCacheLayout(LAYERS, KV_HEADS, DIM, 16, self.kept)
        longest = [(length + 60, 1) for length in lengths]
        self.first = make_batch(layout, longest)
        self.lengths = list(lengths)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, AttentionBatch]]:
        for step in range(graph.STEPS_BEFORE + 6):
            yield self.step(step)

    def step(self, step: int) -> tuple[torch.Tensor, AttentionBatch]:
        first, query_lens = self.first, [1] * len(self.lengths)
        if self.rows is not None:
            query_lens = self.rows[:: -1 if step % 2 else 1]
        count = sum(query_lens)
        kv_lens = [
            length + step + num - 1 for length, num in zip(self.lengths, query_lens, strict=True)
        ]
        angles = torch.rand((count, DIM // 2), generator=self.generator)
        batch = AttentionBatch(
            query_start=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
            kv_len=torch.tensor(kv_lens, dtype=torch.int32),
            block_table=first.block_table[:, : -(-max(kv_lens) // 16)].clone(),
            num_decodes=0 if self.rows else count,
            max_query_len=max(query_lens),
            max_kv_len=max(kv_lens),
            cos=torch.cos(angles),
            sin=torch.sin(angles),
            caches=first.caches,
            query_lens=query_lens,
            kv_lens=kv_lens,
        )
        embeds = torch.randn((count, HIDDEN), generator=self.generator).to(self.dtype)
        return embeds, batch


def compare(run: Layers, steps: Steps) -> graph.StepGraphs:
    """Run steps both ways, on caches of their own; every result has the same bits."""
    graphs = graph.StepGraphs(run)
    other = Steps(steps.lengths, steps.dtype, steps.rows, steps.kept)
    for (embeds, batch), (same, twin) in zip(steps, other, strict=True):
        found = graphs(embeds, batch).clone()
        assert torch.equal(found, run(same, twin))
    for own, theirs in zip(steps.first.caches, other.first.caches, strict=True):
        assert torch.equal(own.k, theirs.k)
        assert torch.equal(own.v, theirs.v)
    return graphs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 3])
def test_replayed_steps_have_the_bits_of_launched_ones(form: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for lengths in ([1], [30, 252, 3], [510]):
            run = Layers(form)
            graphs = compare(run, Steps(lengths, run.dtype))
            assert list(graphs.captured) == [len(lengths)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_steps_that_try_tokens_are_captured_by_their_number_of_rows(
    form: str, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for lengths, rows in (([30], [5]), ([3, 252, 510], [1, 9, 4])):
            run = Layers(form)
            graphs = compare(run, Steps(lengths, run.dtype, rows))
            assert list(graphs.captured) == [-sum(rows)]
        windowed = Layers("bfloat16", window=33)
        assert compare(windowed, Steps([20, 300], torch.bfloat16, [3, 1])).captured
    finally:
        torch.set_num_threads(before)


def test_prompts_are_not_captured() -> None:
    run = Layers("float32")
    assert not compare(run, Steps([30], run.dtype, [graph.MOST_QUERIES + 1])).captured


def test_a_cache_in_int8() -> None:
    run = Layers("bfloat16", window=33)
    for rows in (None, [3, 1]):
        assert compare(run, Steps([20, 300], run.dtype, rows, torch.int8)).captured


def test_windows_of_some_layers() -> None:
    run = Layers("bfloat16", window=33)
    assert compare(run, Steps([20, 300], run.dtype)).captured


def test_sums_over_ranks_are_taken_again_in_every_replayed_step() -> None:
    run, calls = Layers("float32"), [0]

    def changed(x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return x.add_(calls[0] // (2 * LAYERS) + x.flip(0))

    for attention, mlp, *_ in run.layers:
        for layer in (attention.o, mlp.down):
            layer.forward = _then(layer.forward, ops.between_launches(changed))
    graphs, other = graph.StepGraphs(run), Steps([20, 300, 7], run.dtype)
    for (embeds, batch), (same, twin) in zip(Steps([20, 300, 7], run.dtype), other, strict=True):
        before = calls[0]
        found = graphs(embeds, batch).clone()
        assert calls[0] == before + 2 * LAYERS
        calls[0] = before
        assert torch.equal(found, run(same, twin))
    assert graphs.captured


def _then(product: Multiply, change: Multiply) -> Multiply:
    return lambda x: change(product(x))


def test_graphs_are_dropped_when_threads_or_caches_change() -> None:
    run = Layers("float32")
    graphs = graph.StepGraphs(run)
    before = torch.get_num_threads()
    steps = Steps([5, 6], run.dtype)
    for embeds, batch in steps:
        graphs(embeds, batch)
    assert list(graphs.captured) == [2]
    try:
        torch.set_num_threads(before + 1)
        old = graphs.captured[2]
        graphs(*steps.step(20))
        assert not graphs.captured
        for step in range(21, 22 + graph.STEPS_BEFORE):
            graphs(*steps.step(step))
        assert graphs.captured[2] is not old, "captured again, for the other number of threads"
    finally:
        torch.set_num_threads(before)
    embeds, batch = Steps([5, 6], run.dtype).step(0)
    twin_embeds, twin = Steps([5, 6], run.dtype).step(0)
    assert torch.equal(graphs(embeds, batch), run(twin_embeds, twin))


def test_a_step_with_other_operations_runs_launch_by_launch() -> None:
    layers = Layers("float32")

    def run(embeds: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        return layers(embeds, batch) * 2

    graphs = graph.StepGraphs(run)
    other = Steps([4], torch.float32)
    for (embeds, batch), (same, twin) in zip(Steps([4], torch.float32), other, strict=True):
        assert torch.equal(graphs(embeds, batch), run(same, twin))
    assert not graphs.captured


def test_bidirectional_spans_are_not_captured() -> None:
    layers = Layers("float32")
    for attention, *_ in layers.layers:
        attention.variant = AttentionVariant(bidirectional=torch.zeros((2, 1), dtype=torch.int64))
    graphs = graph.StepGraphs(layers)
    for embeds, batch in Steps([4], torch.float32):
        graphs(embeds, batch)
    assert not graphs.captured


def test_the_kernel_of_a_replay_is_for_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "is_x86", lambda: False)
    signature = ((types.CPointer(types.int64),), types.void)
    options = {"error_model": "numpy", "nopython": True, "nogil": True}
    compiled = CFunc(graph.build_replay(), signature, locals={}, options=options)
    compiled.compile()
    assert "atomicrmw" in compiled.inspect_llvm()
    assert "llvm.x86" not in compiled.inspect_llvm()


def run_steps(graphs: graph.StepGraphs, steps: Steps, caches: list[LayerCache]) -> None:
    """Run steps until they have been captured; all sequences lie in the same cache."""
    steps.first.caches = caches
    for embeds, batch in steps:
        graphs(embeds, batch)


def test_graphs_are_bounded_and_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all numbers of rows take beside the largest are the arguments of launches."""
    monkeypatch.setattr(graph, "MOST_GRAPHS", 12)
    run = Layers("float32")
    graphs = graph.StepGraphs(run)
    caches = Steps([3] * (graph.MOST_GRAPHS + 2), run.dtype).first.caches
    for count in range(1, graph.MOST_GRAPHS + 3):
        run_steps(graphs, Steps([3] * count, run.dtype), caches)
    assert len(graphs.captured) == graph.MOST_GRAPHS
    assert 1 not in graphs.captured
    again = Steps([3], run.dtype)
    again.first.caches = caches
    graphs(*again.step(0))
    assert 1 in graphs.captured, "at the first step of a kind that was captured before"
    assert len(graphs.captured) == graph.MOST_GRAPHS
    found = graphs.captured.values()
    wide = HIDDEN * 64 * 4
    assert max(each.used_bytes for each in found) < 40 * wide
    assert max(each.nbytes for each in found) < 20 * LAYERS * NUM_ARGS * 8


def test_graphs_that_share_memory_take_turns() -> None:
    run = Layers("bfloat16")
    graphs = graph.StepGraphs(run)
    pairs = []
    for count in (3, 2):
        own, other = (Steps([30, 252, 3][:count], run.dtype) for _ in range(2))
        if pairs:  # the first sequences of the larger step, in its cache
            for steps, larger in zip((own, other), pairs[0], strict=True):
                steps.first.caches = larger.first.caches
                steps.first.block_table = larger.first.block_table[:count]
        pairs.append((own, other))
    for step in range(graph.STEPS_BEFORE + 8):
        for own, other in pairs:
            embeds, batch = own.step(step)
            same, twin = other.step(step)
            assert torch.equal(graphs(embeds, batch), run(same, twin))
    assert list(graphs.captured) == [3, 2]


def test_steps_that_need_too_much_memory_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Layers("float32")
    caches = Steps([3] * 12, run.dtype).first.caches
    graphs = graph.StepGraphs(run)
    run_steps(graphs, Steps([3] * 3, run.dtype), caches)
    monkeypatch.setattr(graph, "MOST_BYTES", graphs.captured[3].used_bytes)
    graphs = graph.StepGraphs(run)
    for count in (12, 2, 3, 11):
        run_steps(graphs, Steps([3] * count, run.dtype), caches)
    assert list(graphs.captured) == [2, 3]
