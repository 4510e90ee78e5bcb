"""Steps with LoRA adapters beside steps without, in turn.

    python -m benchmarks.adapters [--rank N] [--dtype DTYPE] [--quantization FORMAT] [--threads N]

One engine with random weights in the shape of one of 0.5B parameters decodes sequences without an
adapter, all with one, or each with one of three, which change all linear layers; and it computes a
long prompt. Figures are the time of the model runner's steps: with one thread its CPU time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.harness import Report, in_turn, quickest
from benchmarks.peers.checkpoints import build
from benchmarks.steps import FIRST_STEPS, SHAPE, timed_steps

SIDES = ("none", "one", "three")
PROMPT_TOKENS, TOKENS = 16, 24


def make_adapter(folder: Path, model: Path, rank: int, seed: int) -> Path:
    """Write a random adapter of all linear layers of the decoder."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(str(model / "model.safetensors"), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            shape = file.get_slice(name).get_shape()
            if not name.endswith("_proj.weight"):
                continue
            own = f"base_model.model.{name.removesuffix('.weight')}"
            for side, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                values = torch.randn(size, generator=generator) * 0.02
                tensors[f"{own}.lora_{side}.weight"] = values.to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


class Subject:
    """The engine, which is this process, and the times of its steps."""

    def __init__(self, model: Path, scratch: Path, options: argparse.Namespace) -> None:
        from sensorium import LLM, LoRARequest, SamplingParams

        self._llm = LLM(
            str(model),
            dtype=options.dtype,
            quantization=options.quantization,
            num_threads=options.threads,
            kv_cache_memory_bytes=1 << 29,
            enable_prefix_caching=False,
            enable_lora=True,
            max_lora_rank=max(options.rank, 64),
        )
        self._adapters = [
            LoRARequest(str(n), n, str(make_adapter(scratch / str(n), model, options.rank, n)))
            for n in range(3)
        ]
        self._params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        self._one = SamplingParams(temperature=0.0, max_tokens=1)
        self._steps = timed_steps(options.threads)

    def decode(self, side: str, rows: int) -> list[float]:
        """Return the seconds of decode steps of so many sequences."""
        prompts = [_prompt(PROMPT_TOKENS, row) for row in range(rows)]
        return self._run(side, prompts, self._params)[FIRST_STEPS:]

    def prefill(self, side: str, tokens: int) -> list[float]:
        """Return the seconds of the step that computes a prompt of so many tokens."""
        return self._run(side, [_prompt(tokens, 3)], self._one)[:1]

    def _run(self, side: str, prompts: list[Any], params: Any) -> list[float]:
        count = SIDES.index(side) and (1 if side == "one" else len(self._adapters))
        own = [self._adapters[i % count] if count else None for i in range(len(prompts))]
        self._steps.clear()
        self._llm.generate(prompts, params, use_tqdm=False, lora_request=own)
        return list(self._steps)


def _prompt(length: int, row: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [100 + (7 * i + 17 * row) % 1000 for i in range(length)]}


def compare(measure: Any, size: int, rounds: int) -> dict[str, Any]:
    """Measure all sides in turn."""
    times: dict[str, list[float]] = defaultdict(list)
    for side in SIDES:
        measure(side, size)  # captures, and warms up
    for number in range(rounds):
        for side in in_turn(SIDES, number):
            times[side] += measure(side, size)
    found: dict[str, dict[str, float]] = {side: quickest(times[side]) for side in SIDES}
    base = found["none"]["lower_quartile_ms"]
    ratios = {side: found[side]["lower_quartile_ms"] / base for side in SIDES[1:]}
    return {"size": size, **found, "times_as_long": ratios}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 16])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of random weights")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or Path(scratch) / "model"
        if options.model is None:
            build(SHAPE, model)
        subject = Subject(model, Path(scratch), options)
        given = {**vars(options), "model": options.model is not None and options.model.name}
        settings = {name: str(value) for name, value in given.items() if name != "output"}
        report = Report("adapters", settings, options.output)
        found: dict[str, list[Any]] = {"decode": [], "prefill": []}
        plan = [("decode", subject.decode, rows) for rows in options.rows]
        plan += [("prefill", subject.prefill, tokens) for tokens in options.prompts]
        for kind, measure, size in plan:
            found[kind].append(compare(measure, size, options.rounds))
            report.write(**found)
            own = found[kind][-1]
            sides = ", ".join(f"{side} {own[side]['lower_quartile_ms']:.2f} ms" for side in SIDES)
            print(f"{kind} {size}: {sides}", flush=True)
    print(report.path)


if __name__ == "__main__":
    main()
