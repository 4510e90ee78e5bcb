"""The published formats that tests write, and what the loader makes of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tests.checkpoints import quantized as q

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
"""Sizes whose matrices have groups of 128 inputs and FP8 blocks."""
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_BNB4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


@dataclass(frozen=True)
class Form:
    """How weights are written, the settings beside them, and the format in memory."""

    write: Callable[[torch.Tensor], q.Stored]
    settings: Mapping[str, Any]
    held: str
    """``int4`` or ``int8`` for integers that are kept, ``made`` for others."""


def _awq(group: int, version: str = "gemm", held: str = "int4") -> Form:
    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": version,
        "zero_point": True,
        "modules_to_not_convert": ["visual"],
    }
    return Form(partial(q.awq, group=group, version=version), settings, held)


def _gptq(held: str, **options: Any) -> Form:
    version = options.get("version", 1)
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": options.get("bits", 4),
        "group_size": options.get("group", 128),
        "sym": options.get("symmetric", True),
        "desc_act": options.get("act_order", False),
        "damp_percent": 0.01,
        "true_sequential": True,
    }
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    return Form(partial(q.gptq, **options), settings, held)


def _packed(held: str, **options: Any) -> Form:
    group = options.get("group", 128)
    weights = {
        "num_bits": options.get("bits", 4),
        "type": "int",
        "symmetric": options.get("symmetric", True),
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "actorder": "group" if options.get("act_order") else None,
    }
    settings = q.compressed("pack-quantized", weights)
    return Form(partial(q.pack_quantized, **options), settings, held)


def _float(strategy: str) -> Form:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
    return Form(partial(q.fp8, scales=strategy), q.compressed("float-quantized", weights), "made")


def _mlx(held: str, bits: int = 4, group: int = 64, **options: Any) -> Form:
    return Form(
        partial(q.mlx, bits=bits, group=group, **options),
        {"bits": bits, "group_size": group, "mode": "affine"},
        held,
    )


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}

FORMS: dict[str, Form] = {
    "awq": _awq(128),
    "awq-64": _awq(64),
    "awq-32": _awq(32),
    "awq-whole": _awq(-1),
    "awq-gemv": _awq(64, "gemv"),
    "gptq": _gptq("int4"),
    "gptq-32-asymmetric": _gptq("int4", group=32, symmetric=False),
    "gptq-64-v2": _gptq("int4", group=64, symmetric=False, version=2),
    "gptq-whole": _gptq("int4", group=-1),
    "gptq-act-order": _gptq("int4", act_order=True, group=32),
    "gptq-act-order-8": _gptq("int8", bits=8, act_order=True, group=64, symmetric=False),
    "gptq-8": _gptq("int8", bits=8),
    "gptq-8-asymmetric": _gptq("int8", bits=8, group=64, symmetric=False),
    "w4a16": _packed("int4"),
    "w4a16-asymmetric": _packed("int4", group=64, symmetric=False),
    "w4a16-zeros-in-bytes": _packed("int4", group=64, symmetric=False, packs_zeros=False),
    "w4a16-channel": _packed("int4", group=None),
    "w4a16-act-order": _packed("int4", group=32, act_order=True),
    "w8a16": _packed("int8", bits=8),
    "w8a16-channel": _packed("int8", bits=8, group=None),
    "w8a8": Form(q.int_quantized, q.compressed("int-quantized", _INT8), "int8"),
    "w8a8-asymmetric": Form(
        partial(q.int_quantized, symmetric=False),
        q.compressed("int-quantized", _INT8 | {"symmetric": False}),
        "int8",
    ),
    "fp8-compressed-tensor": _float("tensor"),
    "fp8-compressed-channel": _float("channel"),
    "fp8-compressed-block": _float("block"),
    "fp8-block": Form(
        partial(q.fp8, scales="block", end="weight_scale_inv"),
        _FP8 | {"weight_block_size": [128, 128]},
        "made",
    ),
    "fp8-static": Form(partial(q.fp8, extra=True), _FP8 | {"activation_scheme": "static"}, "made"),
    "fp8-fbgemm": Form(
        partial(q.fp8, scales="channel"),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        "made",
    ),
    "fp8-modelopt": Form(
        partial(q.fp8, extra=True), {"quant_method": "modelopt", "quant_algo": "FP8"}, "made"
    ),
    "nf4": Form(q.nf4, _BNB4, "made"),
    "nf4-once": Form(
        partial(q.nf4, nested=False, block=128),
        _BNB4 | {"bnb_4bit_use_double_quant": False},
        "made",
    ),
    "llm-int8": Form(q.llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
    "mlx": _mlx("int4"),
    "mlx-32-bfloat16": _mlx("int4", group=32, dtype=torch.bfloat16),
    "mlx-2": _mlx("int4", bits=2),
    "mlx-3": _mlx("int4", bits=3),
    "mlx-5": _mlx("int8", bits=5),
    "mlx-6": _mlx("int8", bits=6, group=128),
    "mlx-8": _mlx("int8", bits=8),
}
