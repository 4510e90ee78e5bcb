"""Quantized checkpoints of each kind of family answer as the numbers that they stand for would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium.models import loader
from sensorium.multimodal.placeholders import PlaceholderIds
from sensorium.text.tokenizer import Tokenizer
from tests.checkpoints import (
    make_llava,
    make_phi3_v,
    make_qwen2_5_vl,
    make_qwen2_vl,
    make_text,
    make_ultravox,
)
from tests.checkpoints import quantized as q
from tests.models.harness import Harness, picture, text_ids
from tests.models.loading.published.forms import FORMS, SIZES

TEXT = "<|im_start|>user\nWhat is shown in this picture?"
SIMILAR = 0.995
"""Least cosine of logits of integer products and of those in float32."""


def both(folder: Path, dense: dict[str, torch.Tensor], run: Callable[[str], torch.Tensor]) -> None:
    """Compare the logits of a quantized checkpoint with those of the numbers it stands for."""
    found = run(str(folder))
    plain = folder.with_name(f"{folder.name}-plain")
    shutil.copytree(folder, plain)
    q.write_dense(plain, dense)
    expected = run(str(plain))
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    assert cosine.min() > SIMILAR


def text_logits(folder: str) -> torch.Tensor:
    harness = Harness(loader.load(folder, device="cpu", dtype="float32"))
    return harness.prefill(harness.add(list(range(30, 62))))


def image_logits(marker: str) -> Callable[[str], torch.Tensor]:
    def run(folder: str) -> torch.Tensor:
        harness = Harness(loader.load(folder, device="cpu", dtype="float32"))
        processor = harness.loaded.processor
        if processor is not None and processor.markup is not None:
            tokenizer = Tokenizer.from_folder(Path(folder))
            placeholders = PlaceholderIds(processor, processor.markup)
            before, [found] = placeholders.split(marker + TEXT)
            ids = [*tokenizer.encode(before[0]), *found.ids, *tokenizer.encode(before[1])]
        else:
            ids = text_ids(Path(folder), marker + TEXT)
        return harness.prefill(harness.add(ids, [picture(56, 84, 0)]))

    return run


QWEN = image_logits("<|vision_start|><|image_pad|><|vision_end|>")


@pytest.mark.parametrize("form", ["awq", "gptq", "w4a16", "w8a8", "fp8-block", "nf4", "llm-int8"])
def test_qwen2_vl(tmp_path: Path, form: str) -> None:
    folder = make_qwen2_vl(tmp_path / "model", text=SIZES)
    dense = q.quantize(folder, FORMS[form].write, FORMS[form].settings)
    both(folder, dense, QWEN)


def test_qwen2_5_vl_sharded(tmp_path: Path) -> None:
    folder = make_qwen2_5_vl(tmp_path / "model", text=SIZES, vision={"out_hidden_size": 128})
    dense = q.quantize(folder, FORMS["awq-64"].write, FORMS["awq-64"].settings)
    _shard(folder)
    both(folder, dense, QWEN)


def _shard(folder: Path) -> None:
    """Spread the tensors of each layer over two files."""
    path = folder / "model.safetensors"
    tensors, places = load_file(path), {}
    path.unlink()
    for index in range(2):
        file = f"model-{index + 1:05}-of-00002.safetensors"
        own = sorted(tensors)[index::2]
        save_file({name: tensors[name] for name in own}, folder / file)
        places |= dict.fromkeys(own, file)
    text = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)


def test_llava_with_a_quantized_tower_and_projector(tmp_path: Path) -> None:
    vision = {"hidden_size": 64, "intermediate_size": 128}
    folder = make_llava(tmp_path / "model", text=SIZES, vision=vision)
    form, table = FORMS["llm-int8"], "embed_tokens"
    dense = q.quantize(
        folder,
        form.write,
        form.settings,
        lambda name: _is_matrix(folder, name) and table not in name and "lm_head" not in name,
    )
    assert sum("vision" in name for name in dense) > 10
    both(folder, dense, image_logits("<image>\n"))


def _is_matrix(folder: Path, name: str) -> bool:
    path = folder / "model.safetensors"
    shape = load_file(path)[name].shape
    return len(shape) == 2 and name.endswith(".weight") and "position" not in name


@pytest.mark.parametrize("form", ["awq-64", "gptq", "fp8-block"])
def test_phi3_v_whose_layers_are_fused_in_the_file(tmp_path: Path, form: str) -> None:
    folder = make_phi3_v(tmp_path / "model", **SIZES)
    dense = q.quantize(
        folder,
        FORMS[form].write,
        FORMS[form].settings,
        lambda name: q.is_linear(name) and "embed_tokens" not in name,
    )
    both(folder, dense, image_logits("<|image_1|>\n"))


def test_qwen2_vl_as_mlx_vlm_names_it(tmp_path: Path) -> None:
    """Its names, quantized towers and tables, and channels of convolutions last."""
    vision = {"embed_dim": 128, "hidden_size": 128}
    folder = make_qwen2_vl(tmp_path / "model", text=SIZES, vision=vision)
    form = FORMS["mlx-32-bfloat16"]
    dense = q.quantize(folder, form.write, form.settings, lambda name: _is_matrix(folder, name))
    assert sum("visual" in name for name in dense) > 10
    _as_mlx(folder, ("visual.", "vision_tower."), ("model.", "language_model.model."))
    both(folder, dense, QWEN)


def test_llava_as_mlx_vlm_names_it(tmp_path: Path) -> None:
    vision = {"hidden_size": 64, "intermediate_size": 128}
    folder = make_llava(tmp_path / "model", text=SIZES, vision=vision)
    form = FORMS["mlx"]
    dense = q.quantize(folder, form.write, form.settings, lambda name: _is_matrix(folder, name))
    _as_mlx(folder)
    both(folder, dense, image_logits("<image>\n"))


def _as_mlx(folder: Path, *renames: tuple[str, str]) -> None:
    """Rename beginnings, and move the channels of convolutions behind all other axes."""
    path, tensors = folder / "model.safetensors", {}
    for name, tensor in load_file(path).items():
        for old, new in (*renames, ("lm_head", "language_model.lm_head")):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        moved = tensor.dim() > 3
        tensors[name] = tensor.movedim(1, -1).contiguous() if moved else tensor
    save_file(tensors, path, metadata={"format": "mlx"})


def test_a_backbone_that_is_quantized(tmp_path: Path) -> None:
    folder = make_ultravox(tmp_path / "model")
    form = FORMS["awq-32"]
    dense = q.quantize(folder / "text", form.write, form.settings)
    found = text_logits(str(folder))
    q.write_dense(folder / "text", dense)
    expected = text_logits(str(folder))
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > SIMILAR


def test_a_head_and_a_table_that_are_quantized(tmp_path: Path) -> None:
    folder = make_text("llama", tmp_path / "model", **SIZES)
    form = FORMS["w8a16-channel"]
    ends = "proj.weight", "lm_head.weight", "embed_tokens.weight"
    dense = q.quantize(folder, form.write, form.settings, lambda name: name.endswith(ends))
    both(folder, dense, text_logits)


@pytest.mark.parametrize("head", ["stored", "tied"])
def test_heads_of_tied_models(tmp_path: Path, head: str) -> None:
    folder = make_text("qwen2", tmp_path / "model", **SIZES)
    form = FORMS["gptq"]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if head == "stored":
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 1}, path)
    wanted = ("proj.weight", "lm_head.weight") if head == "stored" else ("proj.weight",)
    dense = q.quantize(folder, form.write, form.settings, lambda name: name.endswith(wanted))
    both(folder, dense, text_logits)


def test_parts_of_one_layer_that_differ(tmp_path: Path) -> None:
    """One matrix of a fused layer is plain, one has other groups, one has other bits."""
    folder = make_text("llama", tmp_path / "model", **SIZES)
    writers = {
        "q_proj": FORMS["gptq"].write,
        "k_proj": FORMS["gptq-32-asymmetric"].write,
        "gate_proj": FORMS["gptq-8"].write,
        "up_proj": FORMS["gptq"].write,
    }
    dense: dict[str, torch.Tensor] = {}
    for end, write in writers.items():
        settings = FORMS["gptq"].settings | {"dynamic": {r"-:.*v_proj.*": {}}}
        own = q.quantize(folder, write, settings, lambda name, end=end: f"{end}.weight" in name)
        dense |= {name: tensor for name, tensor in own.items() if f"{end}.weight" in name}
    both(folder, _all_weights(folder, dense), text_logits)


def _all_weights(folder: Path, dense: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ends = ("qweight", "qzeros", "scales", "g_idx")
    plain = load_file(folder / "model.safetensors")
    return {n: t for n, t in plain.items() if not n.endswith(ends)} | dense


def test_settings_that_a_merge_has_left_behind(tmp_path: Path) -> None:
    folder = make_text("llama", tmp_path / "model")
    expected = text_logits(str(folder))
    config = folder / "config.json"
    values: dict[str, Any] = json.loads(config.read_text())
    values["quantization_config"] = dict(FORMS["nf4"].settings)
    config.write_text(json.dumps(values))
    assert torch.equal(text_logits(str(folder)), expected)
