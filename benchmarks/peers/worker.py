"""The process around one engine: loads it once, then measures what it is told on stdin.

Lines of JSON on stdout, one for each event:

    {"event": "first_token", "engine": "name version"}            after loading and one token
    {"event": "figure", "name": …, "value": …, "unit": …, "better": …}
    {"event": "done"}                                             the command is finished
    {"event": "failed", "message": …}                             it is finished, but did not work

Commands are JSON lines too: {"do": "warm_up", "names": ["decode_b8"], "short": false} and
{"do": "measure", "name": "decode_b8", "round": 0}. The end of stdin ends the process. Whatever the
engine itself prints goes to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from benchmarks.peers.engines import HOME, LEVELS
from benchmarks.peers.measurements import MEASUREMENTS, Engine, first_token, warm_up
from benchmarks.peers.workload import Workload


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for all engines."""

    checkpoint: Path
    num_threads: int
    max_model_len: int
    max_num_seqs: int
    kv_cache_gib: int
    max_pixels: int
    dtype: str
    format: str
    home: Path
    cpu: str

    @property
    def torch_dtype(self) -> str:
        """The type of weights in torch's spelling, for engines that have no other formats."""
        return {"": self.dtype, "bf16": "bfloat16"}.get(self.format, self.format)

    @property
    def has_vision(self) -> bool:
        """Whether the checkpoint takes pictures."""
        return "vision_config" in json.loads((self.checkpoint / "config.json").read_text())


def settings_of(arguments: list[str] | None = None) -> Settings:
    """Read the flags that ``compare.py`` gives to every runner."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--kv-cache-gib", type=float, default=2)
    parser.add_argument("--max-pixels", type=int, default=1003520, help="of Qwen2-VL's processor")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--format", default="", help="of the weights; default: as --dtype says")
    parser.add_argument("--home", type=Path, default=HOME, help="folder of conversions and builds")
    parser.add_argument("--cpu", default="native", choices=LEVELS)
    return Settings(**vars(parser.parse_args(arguments)))


def run(settings: Settings, build: Callable[[Settings], Engine]) -> None:
    """Build the engine, report its first token, and obey until stdin ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    workload = Workload(settings.checkpoint)
    engine = build(settings)
    first_token(engine, workload)
    _say(out, event="first_token", engine=engine.name)
    for line in sys.stdin:
        try:
            _obey(json.loads(line), engine, workload, out)
        except Exception as error:
            traceback.print_exc()
            _say(out, event="failed", message=f"{type(error).__name__}: {error}")


def _obey(command: dict[str, Any], engine: Engine, workload: Workload, out: TextIO) -> None:
    if command["do"] == "warm_up":
        warm_up(engine, workload, command["names"], short=command["short"])
    else:
        for figure in MEASUREMENTS[command["name"]](engine, workload, command["round"]):
            _say(out, event="figure", **dataclasses.asdict(figure))
    _say(out, event="done")


def _say(out: TextIO, **message: object) -> None:
    print(json.dumps(message), file=out, flush=True)
