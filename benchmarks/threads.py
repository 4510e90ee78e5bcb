"""Numbers of threads on few cores: more threads than cores, quotas, and a busy neighbour.

    python -m benchmarks.threads [SECTION ...] [--rounds N] [--dtype DTYPE] [--output FILE]

Sections: ``threads`` (1 to 16 on all CPUs that this process may use), ``one-cpu`` (on one of them),
``quota`` (control groups that may take the time of 0.5 to 2 CPUs; needs the right to make such
groups) and ``neighbour`` (another process keeps one CPU busy).

The model has random weights in the shape of one of 0.5B parameters, with few layers. One engine
runs all cases in turn, with the first one changing from round to round: between two cases its
number of threads, its CPUs and its control group change. Every case says how fast it is beside the
first one of its section, and whether it gave the same tokens and log-probabilities.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, in_turn
from benchmarks.peers.checkpoints import Shape, build
from sensorium.processes.cgroups import group_folders
from sensorium.processes.start import end_with

SHAPE = Shape(896, 6, 14, 2, 4864)
UNITS = {
    "decode_1": "tokens/s",
    "slowest_step": "ms",
    "decode_8": "tokens/s",
    "prefill": "tokens/s",
    "cpus_busy": "CPUs",
}
SETTLE_SECONDS = 1.5
"""Time in which an engine adapts its threads before it is measured."""
RUNS, TOKENS, BATCH, PREFILL_TOKENS = 6, 5, 8, 256
PERIOD_US = 100_000


@dataclass(frozen=True, slots=True)
class Case:
    """Threads of the engine, the CPUs it may use, its quota, and whether one CPU is kept busy.

    ``num_threads`` None: the engine adapts them, as it does by default.
    """

    name: str
    num_threads: int | None
    one_cpu: bool = False
    quota: float | None = None
    neighbour: bool = False


SECTIONS = {
    "threads": [Case(f"{n} threads", n) for n in (1, 2, 4, 8, 16)],
    "one-cpu": [Case(f"{n} threads on one CPU", n, one_cpu=True) for n in (1, 2, 4)],
    "quota": [
        Case(f"{n} threads, quota {quota:g}", n, quota=quota)
        for quota in (0.5, 1.0, 1.5, 2.0)
        for n in (1, 2)
    ],
    "neighbour": [
        *(Case(f"{n} threads alone", n) for n in (1, 2)),
        Case("adapted threads alone", None),
        *(Case(f"{n} threads, busy neighbour", n, neighbour=True) for n in (1, 2)),
        Case("adapted threads, neighbour", None, neighbour=True),
    ],
}


class Subject:
    """The engine, which is this process: one with fixed threads, and one that adapts them."""

    def __init__(self, model: Path, dtype: str) -> None:
        from sensorium import LLM, SamplingParams

        self._params = SamplingParams
        self._cpus = sorted(os.sched_getaffinity(0))
        self._make = lambda num_threads: LLM(
            str(model),
            dtype=dtype,
            num_threads=num_threads,
            kv_cache_memory_bytes=1 << 28,
            enable_prefix_caching=False,
        )
        self._fixed, self._adaptive = self._make(1), None
        self._llm = self._fixed
        self._adapted = 0

    def measure(self, case: Case, group: str | None) -> dict[str, Any]:
        """Return the figures of one case, and a digest of what came out."""
        import torch

        self._choose(case.num_threads)
        with (
            in_group(group),
            on_cpus(self._cpus[:1] if case.one_cpu else self._cpus),
            busy_neighbour(self._cpus[-1], case.neighbour),
        ):
            settled = time.perf_counter() + (SETTLE_SECONDS if case.num_threads is None else 0)
            while self._complete([0], 8, TOKENS) and time.perf_counter() < settled:
                pass
            began, spent = time.perf_counter(), time.process_time()
            found = self._figures()
            spent = time.process_time() - spent
            found["cpus_busy"] = spent / (time.perf_counter() - began)
            if case.num_threads is None:
                self._adapted = torch.get_num_threads()
        return found

    def _choose(self, num_threads: int | None) -> None:
        """Use the engine with fixed threads, or the other one with what it had come to."""
        import torch

        if num_threads is None and self._adaptive is None:
            self._adaptive = self._make(None)
            self._adapted = torch.get_num_threads()
        self._llm = self._fixed if num_threads else self._adaptive
        torch.set_num_threads(num_threads or self._adapted)

    def _figures(self) -> dict[str, Any]:
        steps, outputs = [], []
        for number in range(RUNS):
            [output] = self._complete([number], 16, TOKENS)
            times = output.metrics
            steps.append((times.finished_time - times.first_token_time) / (TOKENS - 1))
            outputs.append(output)
        batch = self._complete(list(range(BATCH)), 8, TOKENS)
        started = max(output.metrics.first_token_time for output in batch)
        ended = max(output.metrics.finished_time for output in batch)
        [prompt] = self._complete([0], PREFILL_TOKENS, 1)
        times = prompt.metrics
        text = repr([_bits(output) for output in (*outputs, *batch, prompt)])
        return {
            "decode_1": 1 / statistics.median(steps),
            "slowest_step": 1000 * max(steps),
            "decode_8": BATCH * (TOKENS - 1) / (ended - started),
            "prefill": PREFILL_TOKENS / (times.first_token_time - times.first_scheduled_time),
            "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
        }

    def _complete(self, numbers: Sequence[int], length: int, new: int) -> list[Any]:
        params = self._params(temperature=0.0, max_tokens=new, ignore_eos=True, logprobs=1)
        prompts = [
            {"prompt_token_ids": [1 + (37 * i + 101 * number) % 199 for i in range(length)]}
            for number in numbers
        ]
        return self._llm.generate(prompts, params, use_tqdm=False)


def _bits(output: Any) -> tuple[list[int], float]:
    return output.outputs[0].token_ids, output.outputs[0].cumulative_logprob


@contextlib.contextmanager
def on_cpus(cpus: Sequence[int]) -> Iterator[None]:
    """Keep every thread of this process on some CPUs; those that start meanwhile inherit it."""
    before = os.sched_getaffinity(0)
    _set_affinity(cpus)
    try:
        yield
    finally:
        _set_affinity(before)


def _set_affinity(cpus: Any) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cpus)


@contextlib.contextmanager
def control_groups(quotas: set[float]) -> Iterator[dict[float | None, str | None]]:
    """Make a control group for each quota. Raises OSError where none can be made."""
    folders = group_folders("cpu")
    v1 = [folder for folder in folders if (folder / "cpu.shares").exists()]
    v2 = [folder for folder in folders if (folder / "cgroup.controllers").exists()]
    made: dict[float | None, str | None] = {None: None}
    try:
        for quota in sorted(quotas):
            if not v1 and not v2:
                raise OSError("this system shows no control groups for CPU time")
            folder = (v1 or v2)[-1] / f"sensorium-threads-{os.getpid()}-{quota:g}"
            folder.mkdir()
            made[quota] = str(folder)
            if v1:
                (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (folder / "cpu.cfs_quota_us").write_text(str(int(quota * PERIOD_US)))
                (folder / "cpu.shares").write_text("262144")  # its quota alone is to limit it
            else:
                (folder / "cpu.max").write_text(f"{int(quota * PERIOD_US)} {PERIOD_US}")
                (folder / "cpu.weight").write_text("10000")
        yield made
    finally:
        for path in filter(None, made.values()):
            Path(path).rmdir()


@contextlib.contextmanager
def in_group(group: str | None) -> Iterator[None]:
    """Move this process into a control group, and back into the one around it."""
    if group is None:
        yield
        return
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        Path(group).parent.joinpath("cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def busy_neighbour(cpu: int, wanted: bool) -> Iterator[None]:
    """Keep a CPU busy with a process of its own."""
    if not wanted:
        yield
        return
    code = f"import os; os.sched_setaffinity(0, [{cpu}])\nprint(flush=True)\nwhile True: pass"
    # In the same session: systems may share time between sessions, not between processes.
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        preexec_fn=functools.partial(end_with, os.getpid()),
    ) as process:
        process.stdout.readline()  # type: ignore[union-attr]
        try:
            yield
        finally:
            process.kill()


def run_section(section: Sequence[Case], subject: Subject, rounds: int) -> Any:
    """Measure the cases of a section in turn, and return their results."""
    found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in section}
    try:
        with control_groups({case.quota for case in section if case.quota}) as groups:
            for number in range(rounds):
                for case in in_turn(section, number):
                    found[case.name].append(subject.measure(case, groups[case.quota]))
    except OSError as error:
        return {"not run": f"a control group could not be made: {error}"}
    medians = {name: _medians(measured) for name, measured in found.items()}
    first = section[0].name
    return [
        {
            **asdict(case),
            "medians": medians[case.name],
            "over_first": {name: medians[case.name][name] / medians[first][name] for name in UNITS},
            "same_bits": {r["digest"] for r in found[case.name]} == {found[first][0]["digest"]},
            "rounds": found[case.name],
        }
        for case in section
    ]


def _medians(measured: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in measured) for name in UNITS}


def table(results: Any) -> str:
    """Return the results of a section as text."""
    if isinstance(results, dict):
        return f"  not run: {results['not run']}"
    lines = [f"  {'':<28}" + "".join(f"{f'{n}, {u}':>24}" for n, u in UNITS.items())]
    for found in results:
        pairs = ((found["medians"][name], found["over_first"][name]) for name in UNITS)
        cells = "".join(f"{f'{value:.4g} ({ratio:.2f})':>24}" for value, ratio in pairs)
        same = "same bits" if found["same_bits"] else "OTHER BITS"
        lines.append(f"  {found['name']:<28}{cells}   {same}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of random weights")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or Path(scratch) / "model"
        if options.model is None:
            build(SHAPE, model)
        subject = Subject(model, options.dtype)
        settings = {"rounds": options.rounds, "dtype": options.dtype}
        settings["spin_count"] = os.environ.get("GOMP_SPINCOUNT")
        report = Report("threads", settings, options.output)
        found: dict[str, Any] = {}
        for name in options.sections or SECTIONS:
            found[name] = run_section(SECTIONS[name], subject, options.rounds)
            report.write(sections=found)
            print(f"{name}\n{table(found[name])}", flush=True)
    print(report.path)


if __name__ == "__main__":
    main()
