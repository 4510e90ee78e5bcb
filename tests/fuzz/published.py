"""Quantized checkpoints to damage: ``python -m tests.fuzz.published 5000`` loads as many by hand.

A damaged one is refused with a ``ConfigError``, or loads. Anything else is a fault: another
exception, a crash, or memory far beyond the size of the files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sensorium.errors import ConfigError, UnsupportedModelError
from sensorium.models import loader
from tests.checkpoints import make_text
from tests.checkpoints import quantized as q
from tests.fuzz.memory import Height
from tests.fuzz.mutation import INTERESTING, mutate
from tests.models.loading.published.forms import FORMS

SIZES = {"num_hidden_layers": 1, "intermediate_size": 128, "vocab_size": 448}
CHOSEN = (
    *("awq-32", "awq-gemv", "gptq-32-asymmetric", "gptq-act-order", "gptq-8-asymmetric"),
    *("w4a16-asymmetric", "w4a16-act-order", "w8a8-asymmetric", "fp8-compressed-channel"),
    *("fp8-block", "fp8-static", "nf4", "nf4-once", "llm-int8", "mlx", "mlx-3"),
)
MOST_BYTES = 64 << 20
"""Memory that a load may take; the files have at most 0.3 MiB."""
MOST_MESSAGE = 4000
Header = dict[str, Any]
_DTYPES = (
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "I32", "I16", "I8"),
    *("U8", "U16", "U32", "U64", "BOOL", "F4", "C64", "X9"),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "gptq", "awq", "compressed-tensors", "fp8", "bitsandbytes", "none"),
    *(0, 1, -1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 64, 128, 10**6, 10**30, 0.5, -0.0, float("nan")),
    *([], [0, 0], [128, 128], [1, 2, 3], ["x"], {}, {"group_0": 3}, [[]], "9" * 5000),
)


def bases(folder: Path) -> dict[str, Path]:
    """Good checkpoints by the name of their form."""
    plain, found = make_text("llama", folder / "plain", **SIZES), {}
    for name in CHOSEN:
        found[name] = folder / name
        shutil.copytree(plain, found[name])
        q.quantize(found[name], FORMS[name].write, FORMS[name].settings)
    return found


def parsed(data: bytes) -> tuple[Header, bytes]:
    """Header and tensors of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    header: Header = json.loads(data[8 : 8 + length])
    return header, data[8 + length :]


def joined(header: Header, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def _quantized(header: Header, rng: random.Random) -> str:
    """The name of a tensor, mostly of a quantized weight."""
    names = sorted(name for name in header if name != "__metadata__")
    own = [name for name in names if "proj" in name]
    return rng.choice(own if own and rng.random() < 0.9 else names)


def retype(header: Header, tensors: bytes, rng: random.Random) -> bytes:
    """Another type, and a shape that has as many bytes if there is one."""
    entry = header[_quantized(header, rng)]
    entry["dtype"] = rng.choice(_DTYPES)
    if rng.random() < 0.7:
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        width = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
        entry["shape"] = [size // width.get(entry["dtype"], 1)]
    return joined(header, tensors)


def reshape(header: Header, tensors: bytes, rng: random.Random) -> bytes:
    """Another shape, mostly of as many elements."""
    entry = header[_quantized(header, rng)]
    shape = list(entry["shape"])
    total = math.prod(shape)
    choices = [shape[::-1], [total], [1, total], [total, 1], [*shape, 1], [1, *shape]]
    if total % 2 == 0:
        choices += [[2, total // 2], [total // 2, 2]]
    entry["shape"] = rng.choice(choices) if rng.random() < 0.9 else [rng.choice(INTERESTING)]
    return joined(header, tensors)


def resize(header: Header, tensors: bytes, rng: random.Random) -> bytes:
    """A tensor of another size, in a file that is in order."""
    name = _quantized(header, rng)
    rebuilt, out = {}, b""
    for own, entry in header.items():
        if own == "__metadata__":
            continue
        first, end = entry["data_offsets"]
        data, shape = tensors[first:end], list(entry["shape"])
        if own == name and shape and shape[0]:
            row = len(data) // shape[0]
            shape[0] = max(0, shape[0] + rng.choice((-1, 1, -shape[0], shape[0], -shape[0] // 2)))
            data = (data * 2)[: row * shape[0]]
            shape[0] = len(data) // row if row else shape[0]
        rebuilt[own] = entry | {"shape": shape, "data_offsets": [len(out), len(out) + len(data)]}
        out += data
    return joined(rebuilt, out)


def swap(header: Header, tensors: bytes, rng: random.Random) -> bytes:
    """Two tensors under each other's names."""
    one, other = _quantized(header, rng), _quantized(header, rng)
    header[one], header[other] = header[other], header[one]
    return joined(header, tensors)


def rename(header: Header, tensors: bytes, rng: random.Random) -> bytes:
    """A tensor under another name: it is missing, and there is one too many."""
    name = _quantized(header, rng)
    ends = {own.rpartition(".")[2] for own in header} | {"weight", "SCB", "bias", "weight_g_idx"}
    new = f"{name.rpartition('.')[0]}.{rng.choice(sorted(ends))}"
    header[new] = header.pop(name)
    return joined(header, tensors)


def overwrite(header: Header, tensors: bytes, rng: random.Random) -> bytes:
    """Other values: noise, all ones, infinities, numbers at the edges of integers."""
    entry = header[_quantized(header, rng)]
    first, end = entry["data_offsets"]
    patterns = (b"\xff", b"\x00", b"\x80", b"\x00\x7c", b"\x80\x7f", b"\xff\xff\xff\x7f")
    whole, some = bytearray(tensors), rng.randrange(first, max(end, first + 1))
    stop = end if rng.random() < 0.5 else min(end, some + rng.choice((1, 2, 4, 64)))
    pattern = rng.choice((*patterns, rng.randbytes(8)))
    whole[some:stop] = (pattern * (stop - some))[: stop - some]
    return joined(header, bytes(whole))


def damage_bytes(header: Header, tensors: bytes, rng: random.Random) -> bytes:
    """Changes anywhere in the file, most of them in its header."""
    return mutate(joined(header, tensors), rng)


MUTATORS: tuple[Callable[[Header, bytes, random.Random], bytes], ...] = (
    *(retype, reshape, resize, swap, rename, overwrite, overwrite, damage_bytes),
)


def damage_settings(config: dict[str, Any], rng: random.Random) -> None:
    """Another value of a setting, deep or not."""
    place: Any = config["quantization_config"]
    while rng.random() < 0.5 and isinstance(place, dict):
        inner = [value for value in place.values() if isinstance(value, dict) and value]
        if not inner:
            break
        place = rng.choice(inner)
    keys = [*place, "bits", "group_size", "format", "checkpoint_format", "dynamic", "version"]
    place[rng.choice(keys)] = rng.choice(_VALUES)


def damaged(base: Path, folder: Path, rng: random.Random) -> str:
    """Write a damaged copy of a checkpoint; what was done to it."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    if rng.random() < 0.25:
        config = json.loads((base / "config.json").read_text())
        damage_settings(config, rng)
        (folder / "config.json").write_text(json.dumps(config))
        return "damage_settings"
    done = []
    data = (base / "model.safetensors").read_bytes()
    for _ in range(rng.choice((1, 1, 1, 2))):
        mutator = rng.choice(MUTATORS)
        done.append(mutator.__name__)
        try:
            data = mutator(*parsed(data), rng)
        except (ValueError, KeyError, TypeError, struct.error, IndexError, AttributeError):
            break  # it is damaged as far as it can be already
    (folder / "model.safetensors").write_bytes(data)
    return "+".join(done)


def load(folder: Path) -> str:
    """Load a checkpoint: ``loaded`` or ``refused``; whatever else it raises goes on."""
    try:
        loader.load(str(folder), device="cpu", dtype="float32")
    except (ConfigError, UnsupportedModelError) as error:
        message = str(error)
    else:
        return "loaded"
    assert len(message) < MOST_MESSAGE, "the message is as long as the file"
    return "refused"


def campaign(folder: Path, number: int, seed: int) -> Counter[str]:
    """Load damaged checkpoints; how many were loaded and refused. Raises for the first fault."""
    found, good = Counter[str](), bases(folder / "bases")
    for base in good.values():
        assert load(base) == "loaded"
    for index in range(number):
        rng = random.Random(f"{seed}-{index}")
        name = rng.choice(CHOSEN)
        own = folder / "damaged"
        shutil.rmtree(own, ignore_errors=True)
        done = damaged(good[name], own, rng)
        height = Height()
        try:
            found[load(own)] += 1
            grown = height.grown()
            assert grown < MOST_BYTES, f"it takes {grown >> 20} MiB"
        except Exception as error:
            raise AssertionError(f"seed {seed}, load {index}: {name} after {done}") from error
    return found


def main() -> int:
    """Load damaged checkpoints and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, help="checkpoints to damage")
    parser.add_argument("--seed", type=int, default=0, help="decides all damage")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(Path(folder), arguments.number, arguments.seed)
    print(f"{dict(found)} in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
