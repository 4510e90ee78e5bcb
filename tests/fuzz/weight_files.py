"""Damaged GGUF files: each is refused with an error, or loads; memory is bounded.

``python -m tests.fuzz.weight_files --number 5000`` is the long run by hand. A child process loads
the files, so that one that dies is noticed, and measures how far it grows.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.mutation import mutate

MOST_GROWTH = 64 << 20
"""Bytes that loading one file may add to the process, beside the file's own size twice."""
KINDS = ("Q4_1", "Q8_0", "F32")


def write_samples(folder: Path) -> list[Path]:
    """Write the files that are damaged."""
    from tests.checkpoints import make_text
    from tests.checkpoints.gguf import write_gguf

    source = make_text("llama", folder / "source", num_hidden_layers=1)
    paths = []
    for kind in KINDS:
        paths.append(folder / f"{kind}.gguf")
        write_gguf(source, paths[-1], kind)
    return paths


def run(samples: Sequence[Path], number: int, seed: int, folder: Path) -> Counter[str]:
    """Load ``number`` damaged files in a child, and count what came of them.

    Raises AssertionError that names the seed of the first file that was neither refused nor loaded,
    or that took too much memory.
    """
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.weight_files",
        "--child",
        str(folder),
        *map(str, samples),
    ]
    child = subprocess.run(
        [*command, "--number", str(number), "--seed", str(seed)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    assert child.returncode == 0, f"file {len(lines)} ended the process: {child.stderr[-2000:]}"
    assert len(lines) == number
    for line in lines:
        assert not line["fault"], f"file {line['index']} of seed {seed}: {line['fault']}"
        assert line["grown"] <= MOST_GROWTH + 2 * line["size"], f"file {line['index']}: {line}"
    return Counter(line["outcome"] for line in lines)


def _load(path: Path) -> str:
    """Return what came of a file: ``loaded``, or the class of the error."""
    from sensorium.errors import SensoriumError
    from sensorium.models import loader
    from sensorium.text.chat.chat_template import ChatTemplate
    from sensorium.text.tokenizer import Tokenizer

    try:
        loaded = loader.load(str(path), device="cpu", dtype="float32", replay=False)
        tokenizer = Tokenizer.from_folder(loaded.config.folder)
        ChatTemplate.load(loaded.config.folder, tokenizer)
    except SensoriumError as error:
        return type(error).__name__
    return "loaded"


def _child(samples: Sequence[Path], number: int, seed: int, folder: Path) -> None:
    from sensorium.models.gguf import folder as folders
    from tests.fuzz.memory import Height

    vars(folders)["cache_root"] = lambda: folder / "caches"  # nothing stays behind
    whole = [path.read_bytes() for path in samples]
    for path in samples:
        assert _load(path) == "loaded"  # what is imported and compiled once is not counted
    for index in range(number):
        rng = random.Random(f"{seed}/{index}")
        path = folder / "damaged.gguf"
        path.write_bytes(mutate(rng.choice(whole), rng, whole))
        height, answer = Height(), {"index": index, "size": path.stat().st_size}
        answer |= {"outcome": "", "fault": ""}
        try:
            answer["outcome"] = _load(path)
        except BaseException:
            answer["fault"] = traceback.format_exc()
        print(json.dumps({**answer, "grown": height.grown()}), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.weight_files", description=__doc__)
    parser.add_argument("samples", nargs="*", type=Path)
    parser.add_argument("--number", type=int, default=5000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0, help="decides all of them")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given: Any = parser.parse_args()
    if given.child is not None:
        _child(given.samples, given.number, given.seed, given.child)
        return
    with tempfile.TemporaryDirectory(prefix="sensorium-fuzz-") as folder:
        samples = write_samples(Path(folder))
        print(dict(run(samples, given.number, given.seed, Path(folder))))


if __name__ == "__main__":
    main()
