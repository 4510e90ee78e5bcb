"""Precomputed embeddings for the demo model, as clients send them.

Right ones, wrong ones, damaged ones.
"""

from __future__ import annotations

import base64
import functools
import io
import pickle
import random
import re
import warnings
import zipfile
from collections import OrderedDict
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from tests.fuzz.mutation import INTERESTING, mutate

HIDDEN = 256
GRID = (1, 4, 4)
NUM_EMBEDS = 4
"""Of a grid of 4 x 4 patches, which are merged by fours."""
NAMES = ("image_embeds", "image_grid_thw")


def saved(value: Any, **options: Any) -> bytes:
    """A file of ``torch.save``."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def tensor(seed: int = 0, *shape: int) -> torch.Tensor:
    """Small numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (NUM_EMBEDS, HIDDEN), generator=generator) / 10


class Command:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('executed')",)


@functools.cache
def files() -> dict[str, bytes]:
    """Files by name. Those that begin with ``good`` hold what belongs under ``image_embeds``."""
    good = tensor()
    grid = torch.tensor([GRID])
    both = dict(zip(NAMES, (good, grid), strict=True))
    return {
        "good torch": saved(good),
        "good safetensors": save_safetensors({"x": good}),
        "good half": saved(good.half()),
        "good bfloat16": save_safetensors({"x": good.bfloat16()}),
        "good double": saved(good.double()),
        "good transposed": saved(tensor(0, HIDDEN, NUM_EMBEDS).T),
        "both torch": saved(both),
        "both ordered": saved(OrderedDict(both)),
        "both safetensors": save_safetensors(both),
        "grid": saved(grid),
        **_wrong(good),
        **_strange(good),
    }


def _wrong(good: torch.Tensor) -> dict[str, bytes]:
    """Dense tensors that the model cannot take."""
    holed = good.clone()
    holed[1, 7] = torch.nan
    return {
        "wrong width": saved(tensor(0, NUM_EMBEDS, HIDDEN + 1)),
        "wrong number": saved(tensor(0, NUM_EMBEDS + 1, HIDDEN)),
        "four dimensions": saved(tensor(0, 1, 1, NUM_EMBEDS, HIDDEN)),
        "scalar": saved(torch.tensor(1.0)),
        "nothing": saved(torch.zeros(0, HIDDEN)),
        "not a number": saved(holed),
        "infinite": save_safetensors({"x": good * float("inf")}),
        "too large for float32": saved(good.double() * 1e300),
        "integers": saved(good.long()),
        "booleans": saved(good > 0),
        "expanded": saved(torch.zeros(1, 1).expand(NUM_EMBEDS, HIDDEN)),
        "good eight bits": save_safetensors({"x": good.to(torch.float8_e4m3fn)}),
        "many tensors": save_safetensors({f"t{i}": good.clone() for i in range(40)}),
        "no tensors": save_safetensors({}),
    }


def _strange(good: torch.Tensor) -> dict[str, bytes]:
    """What is no dense tensor, and files that are none of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(good, 0.1, 0, torch.qint8)
        nested = torch.nested.nested_tensor([good, good[:2]])
        strange = {
            "sparse": saved(good.to_sparse()),
            "sparse rows": saved(good.to_sparse_csr()),
            "quantized": saved(quantized),
            "nested": saved(nested),
            "complex": saved(torch.complex(good, good)),
            "meta": saved(good.to("meta")),
            "parameter": saved(torch.nn.Parameter(good)),
            "list": saved([good, good]),
            "deep": saved({"a": {"b": {"c": good}}}),
            "command": saved(Command()),
            "command beside": saved({"image_embeds": good, "x": Command()}),
            "old format": saved(good, _use_new_zipfile_serialization=False),
        }
    bomb = _archive({"archive/data.pkl": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    return {
        **strange,
        "bomb": bomb,
        "bomb within": _archive(
            {"archive/data.pkl": _pickle_of(saved(good))}
            | {f"archive/data/{i}": bytes(1 << 18) for i in range(4)},
            zipfile.ZIP_DEFLATED,
        ),
        "pickle": pickle.dumps({"image_embeds": [1.0]}),
        "pickle of a command": pickle.dumps(Command()),
        "numpy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (4, "
        b"256), }",
        "text": b"no tensors here",
        "empty": b"",
    }


def _archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _pickle_of(data: bytes) -> bytes:
    return next(v for name, v in _members(data).items() if name.endswith("data.pkl"))


# --- damage ---------------------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A file with small changes.

    Anywhere, or within an archive that stays whole, or in a header of JSON.
    """
    others = list(files().values())
    if data[:2] == b"PK" and rng.random() < 0.7:
        members = _members(data)
        name = rng.choice([n for n in members if n.endswith("data.pkl")] * 3 + list(members))
        change = _change_pickle if name.endswith(".pkl") and rng.random() < 0.7 else mutate
        members[name] = change(members[name], rng)
        if rng.random() < 0.1:
            del members[rng.choice(list(members))]
        return _archive(members)
    if data[8:9] == b"{" and rng.random() < 0.7:
        return _change_header(data, rng)
    return mutate(data, rng, others)


def _change_pickle(data: bytes, rng: random.Random) -> bytes:
    """Another integer, another name, in place of one that is there."""
    changed = bytearray(data)
    places = [m.start() for m in re.finditer(rb"[KMJ](?=.)", data, re.DOTALL)]
    if places and rng.random() < 0.7:
        at = rng.choice(places)
        size = {b"K": 1, b"M": 2, b"J": 4}[data[at : at + 1]]
        value = rng.choice(INTERESTING) % (1 << 8 * size)
        changed[at + 1 : at + 1 + size] = value.to_bytes(size, "little")
        return bytes(changed)
    names = (b"FloatStorage", b"_rebuild_tensor_v2", b"OrderedDict", b"torch._utils", b"storage")
    there = [name for name in names if name in data]
    if not there:
        return mutate(data, rng)
    others = (b"UntypedStorage", b"_rebuild_qtensor", b"QInt8Storage", b"eval", b"builtins", b"")
    old = rng.choice(there)
    new = rng.choice(others)[: len(old)].ljust(len(old), b"_")
    return data.replace(old, new, 1)


def _change_header(data: bytes, rng: random.Random) -> bytes:
    """Another number, type or name in the JSON of a safetensors file, whose length is right again."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    found = list(re.finditer(rb"\d+|\"[A-Z]+\d*\"|\"\w+\"|[\[\],{}:]", header))
    start, end = rng.choice(found).span() if found else (0, 0)
    other = rng.choice(
        (
            *(
                b"-1",
                b"1.5",
                b"null",
                b"[]",
                b"{}",
                b'"F64"',
                b'"F8_E4M3"',
                b'"I64"',
                b"[[",
                b'"x"',
            ),
            *(str(number).encode() for number in INTERESTING),
        )
    )
    header = header[:start] + other + header[end:]
    return len(header).to_bytes(8, "little") + header + body


def text(data: bytes) -> str:
    """Base64, as a request holds it."""
    return base64.b64encode(data).decode()


def payload(rng: random.Random) -> Any:
    """What a part holds under ``image_embeds``.

    Mostly a mapping with a file that is wrong or damaged.
    """
    every = files()
    name = rng.choice(sorted(every))
    data = every[name] if rng.random() < 0.3 else damaged(every[name], rng)
    if name.startswith("both") or rng.random() < 0.1:
        return text(data)
    grids: tuple[Any, ...] = (
        text(every["grid"]),
        [list(GRID)],
        [[1, 4, rng.choice(INTERESTING)]],
        [[0, 0, 0]],
        [[-1, 4, -4]],
        [],
        "",
        text(damaged(every["grid"], rng)),
    )
    grid = grids[rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7))]
    return {NAMES[0]: text(data), NAMES[1]: grid}


def good_payload(seed: int = 0) -> dict[str, Any]:
    """Embeddings that the demo model takes."""
    return {NAMES[0]: text(saved(tensor(seed))), NAMES[1]: [list(GRID)]}
