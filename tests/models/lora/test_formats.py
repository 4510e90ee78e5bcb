"""Adapters over weights in every format: the numbers of the dequantized base with them folded in.

They are of DoRA, whose factors are made of those weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sensorium.models import loader
from sensorium.models.gguf import folder as gguf_folders
from sensorium.models.loading.quantize import WeightFormats
from sensorium.models.lora.targets import targets_of
from sensorium.runtime.adapters import AdapterSet
from tests.checkpoints import make_text
from tests.checkpoints import quantized as q
from tests.checkpoints.adapters import make_adapter, merged
from tests.checkpoints.gguf import as_folder, write_gguf
from tests.models.harness import Harness
from tests.models.loading.published.forms import FORMS

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
IDS = list(range(20, 52))
PUBLISHED = ("awq", "gptq-act-order", "gptq-8-asymmetric", "w4a16-asymmetric", "w8a8", "fp8-block",
             "nf4", "llm-int8")  # fmt: skip
GGUF = ("Q4_0", "Q4_1", "Q6_K", "Q8_0")
ERROR = 0.03
"""Bound on the norm of errors beside that of the logits: integer products round their inputs to 8
bits. An adapter adds at most a fifth to it."""
EFFECT = 0.5
"""Least change by the adapter, in the same measure."""
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text("llama", tmp_path_factory.mktemp("plain") / "llama", **WIDE)


@pytest.fixture(scope="module")
def adapter(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(
        tmp_path_factory.mktemp("adapter"), plain, rank=5, strength=0.4, use_dora=True
    )


def written(plain: Path, folder: Path, form: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """The checkpoint in a format, and the numbers of what is not a linear layer of the decoder."""
    if form in GGUF:
        folder.mkdir()
        return folder / "model.gguf", write_gguf(plain, folder / "model.gguf", form)
    shutil.copytree(plain, folder)
    if form in FORMS:
        return folder, q.quantize(folder, FORMS[form].write, FORMS[form].settings)
    return folder, load_file(plain / "model.safetensors")


@pytest.mark.parametrize("form", [*PUBLISHED, *GGUF, "int8", "int4", "none"])
def test_an_adapter_over_weights_in_a_format(
    plain: Path, adapter: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_folders, "cache_root", lambda: tmp_path / "caches")
    base, dense = written(plain, tmp_path / "base", form)
    formats = WeightFormats(decoder=form if form in ("int8", "int4") else "none")
    loaded = loader.load(str(base), device="cpu", dtype="float32", formats=formats)
    limits = {"max_loras": 2, "max_rank": 8, "most_bytes": 1 << 30}
    lanes = AdapterSet(loaded.model, loaded.family, **limits)  # type: ignore[arg-type]
    lane = lanes.load(adapter).lane
    for name, target in targets_of(loaded.model).items():  # type: ignore[arg-type]
        assert target.layer.weight is not None
        rows = torch.arange(target.first, target.first + target.num_outputs)
        dense[f"model.{name}"] = target.layer.weight.rows(rows).float()
    assert dense.keys() >= load_file(plain / "model.safetensors").keys() - {INV_FREQ}
    base = as_folder(plain, tmp_path / "dense", dense)
    whole = merged(tmp_path / "merged", base, adapter)
    own = Harness(loaded)
    without = own.prefill(own.add(IDS))
    error = distance(without, reference(base, IDS))
    assert error < ERROR
    with lanes.rows.everywhere(lane):
        tokens = own.greedy(own.add(IDS), 12)
        found = own.prefill(own.add([*IDS, *tokens]))
    assert torch.equal(without, own.prefill(own.add(IDS))), "the model alone is left alone"
    expected = reference(whole, [*IDS, *tokens])
    assert distance(without, expected[: len(IDS)]) > EFFECT
    assert distance(found, expected) < 1.2 * error + 1e-5
    chosen = expected[len(IDS) - 1 : -1]
    behind = chosen.max(-1).values - chosen[torch.arange(12), torch.tensor(tokens)]
    assert behind.max() < 4 * ERROR * chosen.std(), "greedy tokens are those of the reference"


def reference(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits of a plain checkpoint in float32."""
    harness = Harness(loader.load(str(folder), device="cpu", dtype="float32"))
    return harness.prefill(harness.add(ids))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
