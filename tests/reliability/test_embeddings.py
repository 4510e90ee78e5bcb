"""Precomputed embeddings of every wrong kind.

Refused before the engine sees them, and nothing in them is executed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from tests.reliability.asking import Offline, Service, text

HIDDEN = 256
"""Of the demo model."""
GRID = [[1, 4, 4]]
"""Of a picture of four embeddings."""
QUESTION = text("What is shown?")


def embeds(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (4, HIDDEN)), generator=torch.Generator().manual_seed(0)) / 10


def saved(value: Any, **options: Any) -> str:
    """Base64 of a ``torch.save`` file."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return base64.b64encode(file.getvalue()).decode()


def safe(value: torch.Tensor) -> str:
    """Base64 of a safetensors file."""
    return base64.b64encode(save({"tensor": value.contiguous()})).decode()


def part(value: Any, grid: Any = GRID, modality: str = "image") -> dict[str, Any]:
    """A part of embeddings with their grid, as the Qwen-VL family takes them."""
    kind = f"{modality}_embeds"
    return {"type": kind, kind: {kind: value, f"{modality}_grid_thw": grid}}


def served_form(value: Any) -> Any:
    """Tensors as base64."""
    return saved(value) if isinstance(value, torch.Tensor) else value


def with_nan(value: float) -> torch.Tensor:
    wrong = embeds()
    wrong[1, 2] = value
    return wrong


def odd(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A tensor of a kind that torch warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


WRONG: dict[str, tuple[Any, Any]] = {
    "one dimension": (embeds(HIDDEN), GRID),
    "four dimensions": (embeds(1, 1, 4, HIDDEN), GRID),
    "another hidden size": (embeds(4, HIDDEN - 1), GRID),
    "transposed": (embeds(HIDDEN, 4), GRID),
    "a row too few": (embeds(3, HIDDEN), GRID),
    "a row too many": (embeds(5, HIDDEN), GRID),
    "no rows": (embeds(0, HIDDEN), GRID),
    "whole numbers": (torch.ones(4, HIDDEN, dtype=torch.int64), GRID),
    "booleans": (torch.ones(4, HIDDEN, dtype=torch.bool), GRID),
    "complex numbers": (torch.ones(4, HIDDEN, dtype=torch.complex64), GRID),
    "NaN": (with_nan(float("nan")), GRID),
    "infinity": (with_nan(float("inf")), GRID),
    "too large for float32": (torch.full((4, HIDDEN), 1e300, dtype=torch.float64), GRID),
    "sparse": (embeds().to_sparse(), GRID),
    "sparse in rows": (odd(embeds().to_sparse_csr), GRID),
    "quantized": (
        odd(lambda: torch.quantize_per_tensor(embeds(), 0.1, 0, torch.qint8)),
        GRID,
    ),
    "a grid of zeros": (embeds(), [[0, 4, 4]]),
    "a negative grid": (embeds(), [[1, -4, -4]]),
    "an odd grid": (embeds(), [[1, 3, 5]]),
    "a grid of two": (embeds(), [[4, 4]]),
    "a grid of fractions": (embeds(), [[1.0, 4.5, 4.0]]),
    "a huge grid": (embeds(), [[1 << 40, 1 << 40, 1 << 40]]),
    "two grids": (embeds(), [*GRID, *GRID]),
    "no grid": (embeds(), None),
    "a sparse grid": (embeds(), torch.tensor(GRID).to_sparse()),
    "a grid with a sum that wraps": (embeds(), [[2, 1 << 31, 1 << 31]]),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("modality", ["image", "video"])
def test_wrong_embeddings_are_refused(
    anywhere: Service | Offline, name: str, modality: str
) -> None:
    """CVE-2025-62372: embeddings of a wrong shape ended vLLM's engine.

    Shapes, types, values and grids are checked before it sees them.
    """
    value, grid = WRONG[name]
    if isinstance(anywhere, Service):
        value, grid = served_form(value), served_form(grid)
    answer = anywhere.ask(QUESTION, part(value, grid, modality))
    answer.is_discreet()
    assert answer.status == 400
    assert answer.error["code"] in ("invalid_embeddings", "invalid_request"), answer.body
    assert str(answer.error["param"]).startswith(f"messages[0].content[1].{modality}_embeds")


def test_good_embeddings_are_answered(anywhere: Service | Offline) -> None:
    """What the tests around this one change is good otherwise.

    Tensors and files, of pictures and clips.
    """
    forms: list[Callable[[torch.Tensor], Any]] = [saved, safe]
    if isinstance(anywhere, Offline):
        forms.append(lambda tensor: tensor)
    found = {
        anywhere.ask(part(form(embeds()), form(torch.tensor(GRID))), QUESTION).text
        for form in forms
    }
    assert len(found) == 1
    assert anywhere.ask(part(saved(embeds()), GRID, "video"), QUESTION).status == 200


# --- files ----------------------------------------------------------------------------------------


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def repacked(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> str:
    """A ``torch.save`` file with some of its records replaced."""
    original = zipfile.ZipFile(io.BytesIO(base64.b64decode(saved(embeds()))))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name in original.namelist():
            short = name.partition("/")[2]
            archive.writestr(name, members.get(short, original.read(name)))
    return base64.b64encode(file.getvalue()).decode()


def test_nothing_in_a_file_is_executed(served: Service, tmp_path: Path) -> None:
    """CVE-2025-62164 and every pickle: a file that would run code is read as data, and refused."""
    made = tmp_path / "made"
    bomb = Bomb(made)
    bare = base64.b64encode(pickle.dumps(bomb)).decode()
    inside = repacked({"data.pkl": pickle.dumps(bomb)})
    for value in (saved(bomb), saved({"image_embeds": bomb}), bare, inside):
        answer = served.ask(part(value))
        answer.is_refusal(400, "invalid_embeddings", "messages[0].content[0].image_embeds")
    assert not made.exists()


def sparse_out_of_bounds() -> str:
    """The file of the fault: indices of a sparse tensor that lie far outside of it."""
    indices = torch.tensor([[0, 1 << 40], [0, 1 << 40]])
    wrong = torch.sparse_coo_tensor(indices, torch.ones(2), (4, HIDDEN), check_invariants=False)
    return saved(wrong)


def safetensors_of(header: Any, data: bytes = b"") -> str:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return base64.b64encode(struct.pack("<Q", len(text)) + text + data).decode()


def bomb_of_zeros() -> str:
    """A compressed record of 8 MB in some kilobytes."""
    return repacked({"data/0": bytes(8_000_000)}, zipfile.ZIP_DEFLATED)


TENSOR = {"dtype": "F32", "shape": [4, HIDDEN], "data_offsets": [0, 4 * HIDDEN * 4]}
FILES: dict[str, Callable[[], str]] = {
    "sparse out of bounds": sparse_out_of_bounds,
    "a module": lambda: saved(torch.nn.Linear(2, 2)),
    "numpy": lambda: saved(np.zeros((4, HIDDEN), np.float32)),
    "a number": lambda: saved(3),
    "a list": lambda: saved([embeds()]),
    "nested": lambda: saved({"a": {"b": embeds()}}),
    "many tensors": lambda: saved({str(i): torch.zeros(1) for i in range(100)}),
    "an old file": lambda: saved(embeds(), _use_new_zipfile_serialization=False),
    "a bomb": bomb_of_zeros,
    "a stack of marks": lambda: repacked({"data.pkl": b"\x80\x02" + b"(" * 60_000 + b"."}),
    "a long pickle": lambda: repacked({"data.pkl": b"\x80\x02" + b"N" * 1_000_000 + b"."}),
    "no pickle": lambda: repacked({"data.pkl": b""}),
    "a short storage": lambda: repacked({"data/0": bytes(12)}),
    "half": lambda: saved(embeds())[:2000],
    "a header of a thousand million": lambda: base64.b64encode(
        struct.pack("<Q", 10**9) + b"{" + bytes(100)
    ).decode(),
    "a header of the whole memory": lambda: base64.b64encode(
        struct.pack("<Q", (1 << 64) - 1) + b"{}"
    ).decode(),
    "offsets outside": lambda: safetensors_of(
        {"a": {**TENSOR, "data_offsets": [0, 1 << 40]}}, bytes(4096)
    ),
    "offsets turned round": lambda: safetensors_of(
        {"a": {**TENSOR, "data_offsets": [4096, 0]}}, bytes(4096)
    ),
    "a shape that wraps": lambda: safetensors_of(
        {"a": {**TENSOR, "shape": [1 << 33, 1 << 33]}}, bytes(4096)
    ),
    "a type of no name": lambda: safetensors_of({"a": {**TENSOR, "dtype": "F1"}}, bytes(4096)),
    "a header of depth": lambda: safetensors_of(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "no header": lambda: safetensors_of(b"{}"),
    "text": lambda: base64.b64encode(b"hello").decode(),
    "no base64": lambda: "!!!!",
    "nothing": lambda: "",
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_dense_tensors(served: Service, name: str) -> None:
    """CVE-2025-62164: a sparse tensor with indices out of bounds wrote outside of its memory
    when it was made dense. No sparse tensor is made at all; and what a file claims is checked
    against its bytes.
    """
    answer = served.ask(part(FILES[name]()))
    answer.is_discreet()
    assert answer.error["code"] in ("invalid_embeddings", "media_too_large"), answer.body
    assert str(answer.error["param"]).startswith("messages[0].content[0].image_embeds")


# --- where they may be ----------------------------------------------------------------------------


def test_embeddings_are_off_unless_enabled(closed: Service) -> None:
    """Whoever does not ask for them has nothing of this to fear."""
    value = {"type": "audio_embeds", "audio_embeds": saved(embeds(1, 3, 64))}
    answer = closed.ask(value, QUESTION)
    answer.is_refusal(400, "invalid_request", "messages[0].content[0].audio_embeds")
    assert "--enable-mm-embeds" in answer.error["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_embeddings_of_a_whole_prompt_are_no_field(served: Service, path: str) -> None:
    """CVE-2026-55514 (GHSA-33cg-gxv8-3p8g).

    Embeddings in place of a whole prompt ended engines of models with M-RoPE, as this one is. There
    is no such field: 400, and the engine lives.
    """
    body: dict[str, Any] = {"prompt_embeds": saved(embeds()), "max_tokens": 2}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": "x"}]
    served.post(path, body).is_refusal(400, "invalid_request", "prompt_embeds")


@pytest.mark.parametrize(
    "value",
    [
        embeds(4, 4, 4, 4),
        embeds(2, 3),
        torch.full((1, 3, 64), float("nan")),
        embeds(3, 7).to_sparse(),
        [embeds(3, 7)],
        {"image_embeds": embeds(1, 3, 7)},
        {},
    ],
)
def test_wrong_embeddings_of_audio(sounds: Offline, value: Any) -> None:
    """The same where embeddings come without a grid."""
    prompt = {"prompt": "<|audio|>\nWhat is it?", "multi_modal_data": {"audio": value}}
    answer = sounds.generate(prompt)
    answer.is_discreet()
    assert answer.error["code"] in ("invalid_embeddings", "invalid_request")
    assert str(answer.error["param"]).startswith("prompt.multi_modal_data.audio")


def test_raw_items_and_embeddings_mix(offline: Offline) -> None:
    """In one prompt of ``generate`` as in one message of ``chat``, each at its own place."""
    from tests.reliability.media import picture

    value = {"image_embeds": embeds(), "image_grid_thw": torch.tensor(GRID)}
    prompt = {
        "prompt": "<|vision_start|><|image_pad|><|vision_end|>" * 2,
        "multi_modal_data": {"image": [picture(), value]},
    }
    parts = [{"type": "image_pil", "image_pil": picture()}, part(embeds(), torch.tensor(GRID))]
    asked = [offline.ask(*content, QUESTION) for content in (parts, parts[::-1])]
    assert [answer.status for answer in (offline.generate(prompt), *asked)] == [200] * 3
    wrong = {**value, "image_embeds": embeds(3, HIDDEN)}
    prompt["multi_modal_data"] = {"image": [picture(), wrong]}
    place = "prompt.multi_modal_data.image[1].image_embeds"
    offline.generate(prompt).is_refusal(400, "invalid_embeddings", place)


def test_one_message_alone_holds_embeddings(anywhere: Service | Offline) -> None:
    """Those of a second message are refused, at that message."""
    messages = [
        {"role": "user", "content": [part(saved(embeds())), QUESTION]},
        {"role": "assistant", "content": "a square"},
        {"role": "user", "content": [part(saved(embeds())), QUESTION]},
    ]
    assert anywhere.chat(messages[:1]).status == 200
    anywhere.chat(messages).is_refusal(400, "invalid_request", "messages[2].content")
