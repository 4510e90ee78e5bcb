"""Settings of a quantized checkpoint, as its configuration states them, and what weights become.

No torch: all is known before a weight is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.errors import ConfigError

AWQ_VERSIONS = {"gemm": "gemm", "exllama": "gemm", "ipex": "gemm", "gemv": "gemv"}
"""Layouts of the tensors by the names of ``version``, most of which are kernels."""
GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 2}
"""Versions of the zero points by ``checkpoint_format``."""
COMPRESSED_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    "mixed-precision",
)
MLX_BITS = (2, 3, 4, 5, 6, 8)
MLX_MODES = ("affine", None)
"""Names of codes that are scaled and moved; others are floating-point numbers of few bits."""
PLAIN_FORMATS = ("dense", None)
FP8_METHODS = ("fp8", "fbgemm_fp8", "modelopt")
_UNCHECKED = ("fp8", "fbgemm_fp8", "bitsandbytes", "gptq or awq", "fp8 or int8")
_SCALES = 1.05
"""Times the bytes of its integers that a weight takes in a file, about."""
BYTES_HELD = {"int8": 1.07, "int4": 0.6}
"""Bytes of a weight in memory with its scales and zero points, about."""
_MOST_LABEL = 80
"""Characters: names in files may be of any length."""
MODELOPT_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the tool that quantized a checkpoint.

    Raises ConfigError from whatever reads a value that is not of its type.
    """

    method: str
    """Name of the method, as ``quant_method`` spells it."""
    values: Mapping[str, Any]
    source: str
    """File that states them, such as ``config.json``."""

    @property
    def label(self) -> str:
        """Method and number of bits, or format, such as ``awq, 4 bits``."""
        more = self._detail()
        return f"{self.method}, {more}"[:_MOST_LABEL] if more else self.method[:_MOST_LABEL]

    def _detail(self) -> str | None:
        if self.method == "bitsandbytes":
            return f"{4 if self.values.get('load_in_4bit') else 8} bits"
        bits = next(filter(None, (self.values.get(key) for key in ("bits", "w_bit"))), None)
        if bits is None:
            bits = self.values.get("num_bits")
        if bits is not None:
            return f"{bits} bits"
        named = self.values.get("quant_algo") or self.values.get("format")
        return None if named is None else str(named)

    @property
    def bits(self) -> int | None:
        """Bits of a weight of AWQ or GPTQ; None where nothing says it."""
        return self._integer("bits", "w_bit")

    @property
    def version(self) -> str:
        """Layout of AWQ: ``gemm`` or ``gemv``."""
        return AWQ_VERSIONS[self._version()]

    @property
    def zero_shift(self) -> int:
        """Number by which GPTQ's zero points are larger than they are stored."""
        return 1 if GPTQ_FORMATS[self._checkpoint_format()] == 1 else 0

    @property
    def has_act_order(self) -> bool:
        """Inputs were quantized in the order of their size, and their groups are scattered."""
        found = [group.get("weights") for group in self._groups()]
        orders = [w.get("actorder") for w in found if isinstance(w, Mapping)]
        return self.values.get("desc_act") is True or "group" in orders

    @property
    def varies(self) -> bool:
        """Layers may have other bits and groups than the whole (``dynamic`` of GPTQModel)."""
        return bool(self.values.get("dynamic"))

    def group_of(self, num_inputs: int) -> int:
        """Return how many of a layer's inputs share a scale. Raises ConfigError."""
        group = self._integer("group_size", "q_group_size")
        if group is None:
            group = 128
        if group == -1 or group > num_inputs:
            return num_inputs
        if group < 1:
            raise self.error("group_size", group, "-1 or a number of inputs")
        return group

    def block(self) -> tuple[int, int] | None:
        """Return outputs and inputs that share a scale in FP8; None for whole tensors or rows."""
        block = self.values.get("weight_block_size")
        if block is None:
            return None
        sizes = list(block) if isinstance(block, list | tuple) else []
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise self.error("weight_block_size", block, "two positive numbers, or null")
        return sizes[0], sizes[1]

    def problem(self) -> str | None:
        """Return why weights of this kind cannot be loaded; None if they can."""
        check = {
            "awq": self._awq_problem,
            "gptq": self._gptq_problem,
            "compressed-tensors": self._compressed_problem,
            "modelopt": self._modelopt_problem,
            "mlx": self._mlx_problem,
        }.get(self.method)
        if check is not None:
            return check()
        return None if self.method in _UNCHECKED else "which is not supported"

    def _awq_problem(self) -> str | None:
        if self.bits not in (4, None):
            return f"of which 4 bits are supported, not {self.bits}"
        if self._version() not in AWQ_VERSIONS:
            return f"whose layout {self._version()!r} is not supported (gemm and gemv are)"
        return None

    def _gptq_problem(self) -> str | None:
        if self.bits not in (4, 8, None) and not self.varies:
            return f"of which 4 and 8 bits are supported, not {self.bits}"
        if self.values.get("is_marlin_format") or self._checkpoint_format() not in GPTQ_FORMATS:
            return (
                f"whose layout {self._checkpoint_format()!r} is not supported (gptq and gptq_v2 "
                "are)"
            )
        return None

    def _compressed_problem(self) -> str | None:
        for key in ("sparsity_config", "transform_config"):
            inner = self.values.get(key)
            if (
                isinstance(inner, Mapping)
                and inner
                and inner.get("format", "") not in (PLAIN_FORMATS)
            ):
                return f"with {key}, which is not supported"
        for group in self._groups():
            form = group.get("format") or self.values.get("format") or "naive-quantized"
            if form not in COMPRESSED_FORMATS:
                return f"whose format {form!r} is not supported"
            weights = group.get("weights")
            if not isinstance(weights, Mapping):
                continue
            kind = weights.get("type", "int"), weights.get("num_bits", 8)
            if kind not in (("int", 4), ("int", 8), ("float", 8)):
                return f"whose weights of {kind[1]} bits ({kind[0]}) are not supported"
        return None

    def _groups(self) -> Iterator[Mapping[str, Any]]:
        """Yield the groups of layers of compressed-tensors."""
        groups = self.values.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            if isinstance(group, Mapping):
                yield group

    def _modelopt_problem(self) -> str | None:
        algorithm = self.values.get("quant_algo")
        if algorithm in (None, *MODELOPT_FP8):
            return None
        return f"of which FP8 is supported, not {algorithm}"

    def _mlx_problem(self) -> str | None:
        own = [value for value in self.values.values() if isinstance(value, Mapping)]
        for layer in (self.values, *own):
            mode, bits = layer.get("mode"), layer.get("bits")
            if mode not in MLX_MODES:
                return f"whose mode {mode!r} is not supported (affine is)"
            if bits is not None and bits not in MLX_BITS:
                return f"of which {bits} bits are not supported"
        return None

    def compressed_group(self, num_inputs: int, num_groups: int) -> int:
        """Return how many inputs share a scale in a layer of compressed-tensors.

        The size that a group of layers states and that fits, else equal shares; 0 if none fits.
        """
        for group in self._groups():
            weights = group.get("weights")
            size = weights.get("group_size") if isinstance(weights, Mapping) else None
            if type(size) is int and size > 0 and -(-num_inputs // size) == num_groups:
                return min(size, num_inputs)
        return num_inputs // num_groups if num_groups and num_inputs % num_groups == 0 else 0

    def compressed_blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the blocks of FP8 that groups of layers of compressed-tensors state."""
        for group in self._groups():
            weights = group.get("weights")
            block = weights.get("block_structure") if isinstance(weights, Mapping) else None
            if isinstance(block, list | tuple) and len(block) == 2:
                height, width = block
                if type(height) is int and type(width) is int and height > 0 and width > 0:
                    yield height, width

    @property
    def is_float(self) -> bool:
        """Weights are stored as floating-point numbers of few bits."""
        if self.method == "bitsandbytes":
            return bool(self.values.get("load_in_4bit"))
        found = [group.get("weights") for group in self._groups()]
        return any(isinstance(w, Mapping) and w.get("type") == "float" for w in found)

    @property
    def has_plain_tables(self) -> bool:
        """Embedding and head are plain numbers, as almost always."""
        return self.method != "mlx"

    def stored_bits(self) -> int:
        """Return the bits of a weight in the file, the fewest if layers differ."""
        if self.method == "bitsandbytes":
            return 4 if self.values.get("load_in_4bit") else 8
        if self.method in FP8_METHODS:
            return 8
        if self.method == "compressed-tensors":
            found = [group.get("weights") for group in self._groups()]
            bits = [w.get("num_bits", 8) for w in found if isinstance(w, Mapping)]
            return min((b for b in bits if type(b) is int), default=8)
        return self.bits or 4

    def stored_bytes(self) -> float:
        """Return the bytes of a weight in the file with its share of what scales it, about."""
        bits = self.stored_bits()
        if self.method in ("awq", "gptq", "mlx"):
            offset = 2 if self.method == "mlx" else bits / 8
            return bits / 8 + (2 + offset) / self.group_of(1 << 31)
        return bits / 8 * _SCALES

    def _version(self) -> str:
        return str(self.values.get("version") or "gemm").lower()

    def _checkpoint_format(self) -> str:
        named = self.values.get("checkpoint_format") or self.values.get("format") or "gptq"
        return str(named).lower()

    def _integer(self, *keys: str) -> int | None:
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if type(value) is not int:
                raise self.error(key, value, "a number")
            return value
        return None

    def error(self, key: str, value: object, expected: str) -> ConfigError:
        """Return the error of a setting."""
        return ConfigError(
            f"{self.source}: {key} of the quantization must be {expected}, got {value!r:.80}.",
            param="model",
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """Format of the weights in memory, and bytes of each there and in the file, about."""

    format: str
    """``int8``, ``int4``, or the data type of plain numbers."""
    is_kept: bool
    """The integers of the file are kept as they are."""
    bytes_held: float
    bytes_stored: float

    def text(self) -> str:
        """Return what becomes of the weights, such as ``int4, as they are``."""
        return f"{self.format}, {'as they are' if self.is_kept else 'made when loaded'}"


def plan_of(
    settings: Settings, wanted: str | None, has_products: bool, dtype: str, dtype_bytes: int
) -> Plan:
    """Return what becomes of the weights of linear layers.

    wanted: the option ``quantization``. has_products: this device multiplies with int8 and int4.
    dtype: data type of plain numbers, of ``dtype_bytes`` bytes.
    """
    bits = settings.stored_bits()
    stored = settings.stored_bytes()
    if not has_products or wanted == "none":
        return Plan(dtype, False, dtype_bytes, stored)
    own = _kept_format(settings, bits)
    form = wanted or own or "int8"
    return Plan(form, form == own, BYTES_HELD[form], stored)


def _kept_format(settings: Settings, bits: int) -> str | None:
    """Return the format whose product takes the integers as they are; None if none does."""
    if settings.method in FP8_METHODS or settings.is_float:
        return None
    return "int4" if bits <= 4 else "int8"
