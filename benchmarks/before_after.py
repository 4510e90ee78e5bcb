"""Two revisions of Sensorium in one run: medians, and those after divided by those before.

    python -m benchmarks.before_after BEFORE [AFTER] [--rounds N]

BEFORE and AFTER are revisions of this repository or folders with a checkout of it; AFTER is HEAD
when not given. Both sides run with the packages of this Python, by their public doors only: the
import, ``sensorium serve demo`` over HTTP, and ``sensorium.LLM`` with random weights in the shape
of a model of 0.5B parameters. In each round every figure is measured on each side in turn, and the
first side changes with the round; while one measures, all processes of the other are stopped.
Beside each ratio stand the least and the greatest one of two values measured in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT, Figures, Report, figures_table, in_turn
from benchmarks.media.cache import first_tokens
from benchmarks.peers.engines import EngineKind
from benchmarks.peers.processes import EngineProcess
from benchmarks.served import ServedProcess

BEFORE, AFTER = "before", "after"
SHAPE = "qwen2-0.5b"
MEASUREMENTS = ("decode_b1_short", "decode_b8_short", "prefill")
IMPORTS = {"import": "import sensorium", "import_llm": "from sensorium import LLM"}
KV_CACHE_GIB = 1


@dataclass(frozen=True, slots=True)
class Side:
    """A checkout, a folder for its logs, and one for what it compiles.

    A checkout that is compared with itself is compiled once.
    """

    name: str
    checkout: Path
    scratch: Path
    caches: Path
    num_threads: int

    @property
    def kind(self) -> EngineKind:
        """How its engine is started."""
        return EngineKind("sensorium", Path(sys.executable))

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which ``import sensorium`` finds this checkout."""
        caches = self.caches / "-".join(self.checkout.parts[1:])
        found = self.kind.environment(self.num_threads, KV_CACHE_GIB, caches)
        return {**found, "PYTHONPATH": str(self.checkout / "src")}

    def seconds_to_import(self, statement: str) -> float:
        """Seconds of an import statement in a Python of its own."""
        code = f"import time\nbegin = time.perf_counter()\n{statement}\n"
        code += "import sys\nprint(time.perf_counter() - begin, sys.modules['sensorium'].__file__)"
        command = [sys.executable, "-c", code]
        out = subprocess.run(
            command, cwd=self.scratch, env=self.environment, check=True, capture_output=True
        )
        seconds, file = out.stdout.decode().split(maxsplit=1)
        if not Path(file.strip()).is_relative_to(self.checkout):
            raise RuntimeError(f"{self.name}: sensorium was imported from {file}")
        return float(seconds)

    def server(self) -> ServedProcess:
        """``sensorium serve demo``."""

        def command(port: int) -> list[str]:
            start = [sys.executable, "-m", "sensorium", "serve", "demo", "--port", str(port)]
            return [*start, "--num-threads", str(self.num_threads), "--disable-access-log"]

        log = self.scratch / f"server-{self.name}.log"
        return ServedProcess(
            command, log, is_engine=lambda process: False, environment=self.environment
        )

    def engine(self, checkpoint: Path, dtype: str) -> EngineProcess:
        """The offline engine, loaded."""
        arguments = [str(checkpoint), "--num-threads", str(self.num_threads), "--dtype", dtype]
        arguments += ["--kv-cache-gib", str(KV_CACHE_GIB)]
        log = self.scratch / f"engine-{self.name}.log"
        return EngineProcess(self.kind, arguments, self.environment, log)


def measure_imports(side: Side, figures: Figures) -> None:
    """Note the seconds of each import."""
    for name, statement in IMPORTS.items():
        figures.note(name, side.name, side.seconds_to_import(statement), "s")


async def measure_server(side: Side, figures: Figures, round_: int, num_images: int) -> None:
    """Note the start until /health is 200, and the first tokens of new and known images."""
    begin = time.perf_counter()
    async with side.server() as server:
        figures.note("serve_start", side.name, time.perf_counter() - begin, "s")
        await first_tokens(server.base_url, pairs=1, number=999)  # first uses
        found = await first_tokens(server.base_url, pairs=num_images, number=1000 * round_)
    for kind in ("new", "known"):
        for seconds in found[f"{kind}_seconds"]:
            figures.note(f"image_{kind}", side.name, seconds, "s")


def measure_engines(
    sides: list[Side], figures: Figures, checkpoint: Path, dtype: str, rounds: int
) -> None:
    """Note loading, decode and prefill of both sides' engines in turn."""
    with contextlib.ExitStack() as running:
        engines = {}
        for side in sides:
            engine = side.engine(checkpoint, dtype)
            running.callback(engine.close)
            engine.ask(do="measure", name="decode_b8_short", round="warm")
            engine.freeze()
            engines[side.name] = engine
        for round_ in range(rounds):
            for measurement in MEASUREMENTS:
                for name in in_turn(list(engines), round_):
                    with engines[name].only():
                        found = engines[name].ask(do="measure", name=measurement, round=round_)
                    for figure in found:
                        full_name = f"{figure['name']}_{dtype}"
                        figures.note(
                            full_name, name, figure["value"], figure["unit"], figure["better"]
                        )


def check_out(revision: str, folder: Path) -> tuple[Path, str]:
    """Return the folder of a checkout, unpacked for a revision, and the commit's id."""
    if Path(revision).is_dir():
        return Path(revision).resolve(), "a folder"
    commit = _git("rev-parse", f"{revision}^{{commit}}").decode().strip()
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commit))) as archive:
        archive.extractall(folder, filter="data")
    return folder, commit


def dtypes_of_this_machine() -> list[str]:
    """float32, and bfloat16 where the processor has units for it."""
    flags = Path("/proc/cpuinfo").read_text().split()
    units = {"amx_bf16", "avx512_bf16"} & set(flags)
    return ["bfloat16", "float32"] if units else ["float32"]


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.before_after",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", metavar="BEFORE")
    parser.add_argument("after", metavar="AFTER", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--server-rounds", type=int, default=5, help="of imports and servers")
    parser.add_argument(
        "--images", type=int, default=5, help="pairs of a new and a known one for each server"
    )
    parser.add_argument("--dtypes", nargs="*", default=None, help="default: as the machine has")
    parser.add_argument("--num-threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument(
        "--checkpoint", type=Path, help=f"default: {SHAPE}, built in a temporary folder"
    )
    parser.add_argument(
        "--caches", type=Path, help="compiled code of an earlier run; default: a temporary folder"
    )
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    options = _arguments()
    dtypes = dtypes_of_this_machine() if options.dtypes is None else options.dtypes
    settings = {"rounds": options.rounds, "server_rounds": options.server_rounds, "dtypes": dtypes}
    report = Report(
        "before-after", {**settings, "num_threads": options.num_threads}, options.output
    )
    figures, begin = Figures(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="before-after-") as temporary:
        scratch = Path(temporary)
        caches = options.caches or scratch / "caches"
        sides = []
        for name in (BEFORE, AFTER):
            checkout, commit = check_out(getattr(options, name), scratch / name)
            sides.append(Side(name, checkout, scratch, caches.absolute(), options.num_threads))
            report.content[name] = commit
        for side in {side.checkout: side for side in sides}.values():  # compiles both, and kernels
            measure_imports(side, Figures())
            asyncio.run(measure_server(side, Figures(), 0, 1))
        for round_ in range(options.server_rounds):
            for side in in_turn(sides, round_):
                measure_imports(side, figures)
                asyncio.run(measure_server(side, figures, round_ + 1, options.images))
        _show(figures, begin)
        checkpoint = options.checkpoint
        if dtypes and checkpoint is None:
            from benchmarks.peers.checkpoints import SHAPES, build

            checkpoint = scratch / SHAPE
            build(SHAPES[SHAPE], checkpoint)
        for dtype in dtypes:
            measure_engines(sides, figures, checkpoint.absolute(), dtype, options.rounds)
            _show(figures, begin)
        report.write(figures=figures.summary(AFTER), seconds=time.perf_counter() - begin)
    print(f"results: {report.path}")


def _show(figures: Figures, begin: float) -> None:
    print(figures_table(figures.summary(AFTER), [BEFORE, AFTER], AFTER))
    print(f"{time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
