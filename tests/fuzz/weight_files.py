"""Damaged GGUF files: each is refused with an error, or loads; memory is bounded.

``python -m tests.fuzz.weight_files --number 5000`` is the long run by hand. A child process loads
the files, so that one that dies is noticed, and measures how far it grows.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.mutation import mutate

MOST_GROWTH = 64 << 20
"""Bytes that loading one file may add to the process, beside the file's own size twice."""
MOST_SECONDS = 120
"""Time that one file may take, far more than it needs; then the child ends."""
KINDS = ("Q4_1", "Q8_0", "F32")
K_KINDS = {"attn_q": "Q5_K", "attn_k": "Q3_K", "attn_v": "Q4_K", "ffn_down": "Q6_K"}
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
}
ENCODER = "mmproj.gguf"


def write_samples(folder: Path, more: bool = True) -> list[Path]:
    """Write the files that are damaged, each in a folder of its own beside those that it needs.

    Kinds of weights, K-quants, and a SentencePiece vocabulary; with ``more`` also a Gemma model,
    both parts of a file in two, and the encoders of a Qwen2-VL, a LLaVA and an Idefics3.
    """
    from tests.checkpoints import make_text
    from tests.checkpoints.gguf import write_gguf

    source = make_text("llama", folder / "source", num_hidden_layers=1)
    wide = make_text("llama", folder / "wide", **WIDE)
    paths = [_path(folder, kind) for kind in (*KINDS, "K", "pieces")]
    for kind, path in zip(KINDS, paths, strict=False):
        write_gguf(source, path, kind)
    write_gguf(wide, paths[-2], "Q2_K", others=K_KINDS)
    write_gguf(source, paths[-1], "Q8_0", pieces=True)
    return [*paths, *(_more(folder, source) if more else ())]


def _more(folder: Path, source: Path) -> list[Path]:
    """Write a Gemma model, a file in two parts, and encoders beside their language models."""
    from tests.checkpoints import make_llava, make_qwen2_vl
    from tests.checkpoints.gguf import write_gguf
    from tests.checkpoints.hf import make_hf, make_hf_text
    from tests.checkpoints.mmproj import write_mmproj

    sizes = {"head_dim": 16, "query_pre_attn_scalar": 16}
    gemma = make_hf_text("gemma2", folder / "gemma-source", **sizes)
    paths = [_path(folder, "gemma")]
    write_gguf(gemma, paths[0], "Q8_0", pieces=True, attention__sliding_window=16)
    for part in (1, 2):
        write_gguf(source, _path(folder, f"part-{part}"), "Q8_0", per_part=6)
        paths.append(_path(folder, f"part-{part}").with_name(f"model-0000{part}-of-00002.gguf"))
    kinds = {
        "qwen2_vl": make_qwen2_vl,
        "llava": make_llava,
        "idefics3": partial(make_hf, "idefics3"),
    }
    for name, make in kinds.items():
        model = make(folder / f"{name}-source")
        write_gguf(model, _path(folder, name), "Q8_0")
        paths.append(_path(folder, name).with_name(ENCODER))
        write_mmproj(model, paths[-1], "F16" if name == "idefics3" else "Q8_0")
    return paths


def _path(folder: Path, name: str) -> Path:
    """The file of a model in a folder of this name, which is made."""
    (folder / name).mkdir(exist_ok=True)
    return folder / name / "model.gguf"


def run(samples: Sequence[Path], number: int, seed: int, folder: Path) -> Counter[str]:
    """Load ``number`` damaged files in a child, and count what came of them.

    Raises AssertionError that names the seed of the first file that was neither refused nor loaded,
    or that took too much memory or time.
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
    ended = f"ended the process with status {child.returncode}: {child.stderr[-2000:]}"
    assert child.returncode == 0, f"file {len(lines)} of seed {seed} {ended}"
    assert len(lines) == number
    for line in lines:
        assert not line["fault"], f"file {line['index']} of seed {seed}: {line['fault']}"
        assert line["grown"] <= MOST_GROWTH + 2 * line["size"], f"file {line['index']}: {line}"
    return Counter(line["outcome"] for line in lines)


def _load(folder: Path) -> str:
    """Return what came of a folder's file: ``loaded``, or the class of the error."""
    from sensorium.errors import SensoriumError
    from sensorium.models import loader
    from sensorium.text.chat.chat_template import ChatTemplate
    from sensorium.text.tokenizer import Tokenizer

    mmproj = str(folder / ENCODER) if (folder / ENCODER).exists() else None
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "replay": False}
    try:
        loaded = loader.load(str(folder), mmproj=mmproj, **options)
        tokenizer = Tokenizer.from_folder(loaded.config.folder)
        ChatTemplate.load(loaded.config.folder, tokenizer)
    except SensoriumError as error:
        return type(error).__name__
    return "loaded"


def _child(samples: Sequence[Path], number: int, seed: int, folder: Path) -> None:
    from sensorium.models.gguf import folder as folders
    from tests.fuzz.memory import Height

    faulthandler.enable()
    vars(folders)["cache_root"] = lambda: folder / "caches"  # nothing stays behind
    whole = {path: path.read_bytes() for path in samples}
    for path in samples:
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        assert _load(path.parent) == "loaded"  # imports and compilation are not counted
    for index in range(number):
        rng = random.Random(f"{seed}/{index}")
        sample = rng.choice(samples)
        path = folder / "damaged" / sample.name
        shutil.copytree(sample.parent, path.parent)
        path.write_bytes(mutate(whole[sample], rng, list(whole.values())))
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)  # in whatever code it is
        height, answer = Height(), {"index": index, "size": path.stat().st_size}
        answer |= {"sample": f"{sample.parent.name}/{sample.name}", "outcome": "", "fault": ""}
        try:
            answer["outcome"] = _load(path.parent)
        except BaseException:
            answer["fault"] = traceback.format_exc()
        print(json.dumps({**answer, "grown": height.grown()}), flush=True)
        shutil.rmtree(path.parent)


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
