"""Checkpoints in the formats in which quantized ones are published, made of plain ones.

Each writer quantizes a weight (N, K) in the simplest way and packs it word by word, as the tools'
own files are packed; it returns the tensors of a layer by the ends of their names, and the numbers
that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
Stored = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Tensors of a layer by the ends of their names, and the numbers (N, K) float32."""


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack codes along the last axis: code ``order[i]`` of a word lies at its i-th lowest bits."""
    count = 32 // bits
    padding = -codes.shape[-1] % count
    padded = np.pad(codes.astype(np.uint64), ((0, 0), (0, padding)))
    packed = np.zeros((padded.shape[0], padded.shape[1] // count), np.uint64)
    for place, source in enumerate(order or range(count)):
        packed |= padded[:, source::count] << np.uint64(bits * place)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def codes_of(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, torch.Tensor]:
    """Codes (N, K) from 0 on, scales (N, G) float16, zero points (N, G), and the numbers."""
    num_outputs, num_inputs = weight.shape
    groups = np.arange(num_inputs) // group if groups is None else groups
    values, most = weight.numpy(), (1 << bits) - 1
    num_groups = int(groups.max()) + 1
    codes = np.zeros((num_outputs, num_inputs), np.int64)
    scales = np.zeros((num_outputs, num_groups), np.float16)
    zeros = np.full((num_outputs, num_groups), (most + 1) // 2, np.int64)
    dense = np.zeros((num_outputs, num_inputs), np.float32)
    for g in range(num_groups):
        own = groups == g
        low, high = values[:, own].min(1), values[:, own].max(1)
        if symmetric:
            peak = np.maximum(-low, high)
            scales[:, g] = 2 * peak / most
        else:
            scales[:, g] = (high - low) / most
            zeros[:, g] = np.clip(np.round(-low / scales[:, g].astype(np.float32)), 1, most)
        scale, zero = scales[:, g].astype(np.float32)[:, None], zeros[:, g][:, None]
        codes[:, own] = np.clip(np.round(values[:, own] / scale) + zero, 0, most)
        dense[:, own] = (codes[:, own] - zero) * scale
    return codes, scales, zeros, torch.from_numpy(dense)


def awq(weight: torch.Tensor, group: int = 128, version: str = "gemm") -> Stored:
    group = weight.shape[1] if group == -1 else group
    codes, scales, zeros, dense = codes_of(weight, 4, group, False)
    if version == "gemm":
        tensors = {
            "qweight": words(codes.T.copy(), 4, AWQ_ORDER),
            "qzeros": words(zeros.T.copy(), 4, AWQ_ORDER),
            "scales": torch.from_numpy(scales.T.copy()),
        }
        return tensors, dense
    width = {64: 2, 32: 4}.get(group, 1)
    columns = -(-zeros.shape[1] // (8 * width)) * 8 * width
    padding = ((0, 0), (0, columns - zeros.shape[1]))
    tensors = {
        "qweight": words(codes, 4),
        "qzeros": words(np.pad(zeros, padding), 4),
        "scales": torch.from_numpy(np.pad(scales, padding)),
    }
    return tensors, dense


def gptq(
    weight: torch.Tensor,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    act_order: bool = False,
    version: int = 1,
) -> Stored:
    num_inputs = weight.shape[1]
    size = num_inputs if group == -1 else group
    groups = np.arange(num_inputs) // size
    if act_order:
        groups = groups[np.random.default_rng(num_inputs).permutation(num_inputs)]
    codes, scales, zeros, dense = codes_of(weight, bits, size, symmetric, groups)
    tensors = {
        "qweight": words(codes, bits).t().contiguous(),
        "qzeros": words((zeros - (version == 1)).T.copy(), bits),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    # Words hold inputs of an output: (N, K / c) transposed.
    return tensors, dense


def pack_quantized(
    weight: torch.Tensor,
    bits: int = 4,
    group: int | None = 128,
    symmetric: bool = True,
    act_order: bool = False,
    packs_zeros: bool = True,
) -> Stored:
    num_outputs, num_inputs = weight.shape
    size = num_inputs if group is None else group
    groups = np.arange(num_inputs) // size
    if act_order:
        groups = groups[np.random.default_rng(num_inputs).permutation(num_inputs)]
    codes, scales, zeros, dense = codes_of(weight, bits, size, symmetric, groups)
    tensors = {
        "weight_packed": words(codes, bits),
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor([num_outputs, num_inputs]),
    }
    if not symmetric and packs_zeros:
        tensors["weight_zero_point"] = words(zeros.T.copy(), bits).t().contiguous()
    elif not symmetric:
        signed = (zeros - (1 << (bits - 1))).astype(np.int8)
        tensors["weight_zero_point"] = torch.from_numpy(signed)
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    return tensors, dense


def int_quantized(weight: torch.Tensor, symmetric: bool = True) -> Stored:
    codes, scales, zeros, dense = codes_of(weight, 8, weight.shape[1], symmetric)
    tensors = {
        "weight": torch.from_numpy((codes - 128).astype(np.int8)),
        "weight_scale": torch.from_numpy(scales),
    }
    if not symmetric:
        tensors["weight_zero_point"] = torch.from_numpy((zeros - 128).astype(np.int8))
    return tensors, dense


def fp8(
    weight: torch.Tensor,
    scales: str = "tensor",
    block: tuple[int, int] = (128, 128),
    end: str = "weight_scale",
    extra: bool = False,
) -> Stored:
    num_outputs, num_inputs = weight.shape
    height, width = {
        "tensor": (num_outputs, num_inputs),
        "channel": (1, num_inputs),
        "block": block,
    }[scales]
    rows, columns = -(-num_outputs // height), -(-num_inputs // width)
    factors = torch.zeros(rows, columns)
    stored = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    dense = torch.zeros(weight.shape)
    for r in range(rows):
        for c in range(columns):
            own = slice(r * height, (r + 1) * height), slice(c * width, (c + 1) * width)
            factors[r, c] = weight[own].abs().max() / 448
            stored[own] = (weight[own] / factors[r, c]).to(torch.float8_e4m3fn)
            dense[own] = stored[own].float() * factors[r, c]
    tensors = {"weight": stored, end: factors[0, 0] if scales == "tensor" else factors}
    if extra:
        tensors["input_scale"] = torch.tensor(0.5)
    return tensors, dense


def nf4(weight: torch.Tensor, block: int = 64, nested: bool = True, kind: str = "nf4") -> Stored:
    numbers = torch.tensor(NF4)
    flat = weight.flatten()
    blocks = -(-flat.numel() // block)
    padded = torch.nn.functional.pad(flat, (0, blocks * block - flat.numel())).view(blocks, block)
    factors = padded.abs().amax(1).clamp(min=1e-6)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    tensors: dict[str, torch.Tensor] = {"weight.quant_map": numbers}
    if nested:
        outer, offset = 256, float(factors.mean())
        table = torch.linspace(-1, 1, 256)
        centred = torch.nn.functional.pad(factors - offset, (0, -blocks % outer)).view(-1, outer)
        peaks = centred.abs().amax(1).clamp(min=1e-6)
        places = ((centred / peaks[:, None] + 1) * 127.5).round().long()
        factors = (table[places] * peaks[:, None]).flatten()[:blocks] + offset
        state |= {"nested_blocksize": outer, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {
            "weight.absmax": places.flatten()[:blocks].to(torch.uint8),
            "weight.nested_absmax": peaks,
            "weight.nested_quant_map": table,
        }
    else:
        tensors["weight.absmax"] = factors
    codes = ((padded / factors[:, None])[:, :, None] - numbers).abs().argmin(-1)
    dense = (numbers[codes] * factors[:, None]).flatten()[: flat.numel()].view(weight.shape)
    pairs = codes.flatten()[: flat.numel()].view(-1, 2)
    tensors["weight"] = (pairs[:, 0] << 4 | pairs[:, 1]).to(torch.uint8)[:, None]
    text = json.dumps(state).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
        list(text), dtype=torch.uint8
    )
    return tensors, dense


def mlx(
    weight: torch.Tensor, bits: int = 4, group: int = 64, dtype: torch.dtype = torch.float16
) -> Stored:
    """Codes as one number of many bits for each output, the first code lowest."""
    num_outputs, num_inputs = weight.shape
    most = (1 << bits) - 1
    split = weight.unflatten(1, (-1, group))
    low, high = split.amin(2), split.amax(2)
    # As MLX: the end of larger magnitude is the bias, and scales may be negative.
    is_low = low.abs() > high.abs()
    scales = ((high - low) / most).clamp(min=1e-7) * torch.where(is_low, 1.0, -1.0)
    scales, biases = scales.to(dtype), torch.where(is_low, low, high).to(dtype)
    wide, start = scales.float()[:, :, None], biases.float()[:, :, None]
    codes = ((split - start) / wide).round().clamp(0, most)
    dense = (codes * wide + start).flatten(1)
    packed = np.empty((num_outputs, num_inputs * bits // 32), np.uint32)
    for row, own in enumerate(codes.flatten(1).int().tolist()):
        number = sum(code << bits * place for place, code in enumerate(own))
        packed[row] = np.frombuffer(number.to_bytes(packed.shape[1] * 4, "little"), "<u4")
    tensors = {"weight": torch.from_numpy(packed), "scales": scales, "biases": biases}
    return tensors, dense


def llm_int8(weight: torch.Tensor) -> Stored:
    peaks = weight.abs().amax(1)
    values = (weight * 127 / peaks[:, None]).round().to(torch.int8)
    tensors = {"weight": values, "SCB": peaks, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, values.float() * peaks[:, None] / 127


def compressed(form: str, weights: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Settings of compressed-tensors for one group of layers."""
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*visual.*"],
        "quantization_status": "compressed",
        **more,
    }


def is_linear(name: str) -> bool:
    """Whether tools convert a weight: matrices of layers, not tables, heads and towers."""
    return name.endswith("proj.weight") and "visual" not in name and "vision" not in name


def quantize(
    folder: Path,
    write: Callable[[torch.Tensor], Stored],
    settings: Mapping[str, Any] | None,
    wanted: Callable[[str], bool] = is_linear,
) -> dict[str, torch.Tensor]:
    """Rewrite a folder with quantized weights; the numbers that all its weights stand for."""
    path = folder / "model.safetensors"
    tensors, written, dense = load_file(path), {}, {}
    for name, tensor in tensors.items():
        if not wanted(name):
            written[name] = dense[name] = tensor
            continue
        own, dense[name] = write(tensor.float())
        base = name.removesuffix("weight")
        written |= {f"{base}{end}": value.contiguous() for end, value in own.items()}
    save_file(written, path, metadata={"format": "pt"})
    if settings is not None:
        config = folder / "config.json"
        values = json.loads(config.read_text()) | {"quantization_config": dict(settings)}
        config.write_text(json.dumps(values))
    return dense


def write_dense(folder: Path, dense: Mapping[str, torch.Tensor]) -> None:
    """Rewrite a folder with plain weights, and without settings of a quantization."""
    save_file(dict(dense), folder / "model.safetensors", metadata={"format": "pt"})
    config = folder / "config.json"
    values = json.loads(config.read_text())
    values.pop("quantization_config", None)
    config.write_text(json.dumps(values))
