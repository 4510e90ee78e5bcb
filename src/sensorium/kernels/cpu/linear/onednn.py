"""Linear layers through oneDNN with weights packed once.

A packed weight lies in the blocks that the multiplication reads, which at decode sizes is 1.4 times
as fast as the plain layout and needs no repacking in any call.

A row's product must have the same bits whatever other rows are in the batch. Libraries sum in one
order for many rows, but often in another for one row or a few, where they run other code; for which
numbers of rows depends on the CPU, the dtype and the shape. So it is measured once per shape, and
smaller batches are padded with rows of zeros.

oneDNN compiles a *primitive* for each number of rows. It keeps few of them (see ``threads``), so
that a server whose batches change with every step does not grow. In steps of few rows, compiling
would take as long as multiplying. So these are padded to some numbers of rows that come back.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sensorium.kernels import reference
from sensorium.kernels.cpu import elementwise, findings
from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.weight import Multiply, PackedWeight

logger = logging.getLogger(__name__)

FREE_ROWS = 16
"""Number of rows from which on products need no padding."""
ROW_MULTIPLES = (1, 4, 8, 16)
"""Row multiples to try. Where one row runs other code, oneDNN is faster with four than with one
or two."""
ROW_STEPS = ((32, 4), (64, 8), (128, 16))
"""Up to so many rows: packed products are padded to a multiple of so many. Larger ones take long
enough to compile a primitive for each step, which all layers share."""
_TRIED_ROWS = (1, 3, 5, 17, 31)
_TRIED_FROM = 7
_NONE = 0
"""Stands for a row multiple that was not found."""


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Return whether this torch packs weights of ``dtype`` correctly, as measured on one."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.linspace(-1, 1, 3 * 32).reshape(3, 32).to(dtype)
    weight = torch.linspace(-1, 1, 48 * 32).reshape(48, 32).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        result = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(result.float(), x.float() @ weight.float().t(), rtol=1e-2, atol=1e-2)


@functools.cache
def has_units(dtype: torch.dtype) -> bool:
    """Return whether this CPU has multiply instructions for ``dtype``, and torch uses them.

    Otherwise products of 16-bit numbers run through code that is several times slower than that of
    float32.
    """
    if dtype == torch.float32:
        return True
    if not packs(dtype):
        return False
    # oneDNN packs bf16 on every CPU with AVX-512, though it has to widen each number where these
    # are missing.
    return dtype != torch.bfloat16 or not levels.is_x86() or levels.has_bf16_units()


class LibraryWeight(PackedWeight):
    """Weight in oneDNN's layout, or plain where oneDNN has none for its dtype.

    ``data`` is the plain (N, K) tensor when ``packed`` is false, else opaque. Products of fewer
    than ``FREE_ROWS`` rows are padded to a multiple of ``row_multiple`` rows.
    """

    has_rows = False

    def __init__(
        self, data: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, packed: bool
    ) -> None:
        self.data, self.packed, self.dtype = data, packed, dtype
        self.is_copy = packed
        self.num_outputs, self.num_inputs = shape
        self.format = str(dtype).removeprefix("torch.")
        self.row_multiple = _known_multiple(
            _product(data, None, packed, "none", ""), *shape, dtype, packed
        )

    @property
    def nbytes(self) -> int:
        return self.num_outputs * self.num_inputs * self.dtype.itemsize

    def bind(self, bias: torch.Tensor | None = None, act: str | None = None) -> Multiply:
        name, algorithm = FUSED.get(act or "", ("none", "")) if self.packed else ("none", "")
        product = _product(self.data, bias, self.packed, name, algorithm)
        product = pad_rows(product, self.row_multiple, ROW_STEPS if self.packed else ())
        if act is None or name != "none":
            return product
        activate = elementwise.quick_gelu_ if act == "quick_gelu" else reference.ACTIVATIONS[act]
        return lambda x: activate(product(x))


def pack_weight(weight: torch.Tensor) -> LibraryWeight:
    """Return the (N, K) weight in oneDNN's layout, or plain where oneDNN has none for its dtype."""
    if not packs(weight.dtype):
        return keep_weight(weight)
    data = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    num_outputs, num_inputs = weight.shape
    return LibraryWeight(data, (num_outputs, num_inputs), weight.dtype, packed=True)


def keep_weight(weight: torch.Tensor) -> LibraryWeight:
    """Return the (N, K) weight as it is, for torch's own product."""
    num_outputs, num_inputs = weight.shape
    return LibraryWeight(weight.contiguous(), (num_outputs, num_inputs), weight.dtype, packed=False)


def row_multiple(
    multiply: Multiply, num_inputs: int, dtype: torch.dtype, least: int = 1
) -> int | None:
    """Find the multiple of rows that small products are padded to for invariant results.

    The smallest of ``ROW_MULTIPLES``, and at least ``least``, with which a row has the same bits in
    products of any size; None when none of them will do.
    """
    generator = torch.Generator().manual_seed(0)
    size = _TRIED_FROM + max(_TRIED_ROWS)
    rows = torch.randn(size, num_inputs, generator=generator).to(dtype)
    whole = multiply(rows)

    def same(count: int, multiple: int) -> bool:
        chosen = rows[_TRIED_FROM : _TRIED_FROM + count].contiguous()
        expected = whole[_TRIED_FROM : _TRIED_FROM + count]
        return torch.equal(pad_rows(multiply, multiple)(chosen), expected)

    for multiple in ROW_MULTIPLES:
        if multiple >= least and all(same(count, multiple) for count in _TRIED_ROWS):
            return multiple
    return None


def padded_rows(num_rows: int, multiple: int, steps: Sequence[tuple[int, int]] = ()) -> int:
    """Return how many rows a product of ``num_rows`` runs with.

    multiple: divides them, below ``FREE_ROWS``. steps: as ``ROW_STEPS``; single rows stay alone.
    """
    unit = multiple if num_rows < FREE_ROWS else 1
    if num_rows > 1:
        unit = max(unit, next((size for most, size in steps if num_rows <= most), 1))
    return -(-num_rows // unit) * unit


def pad_rows(multiply: Multiply, multiple: int, steps: Sequence[tuple[int, int]] = ()) -> Multiply:
    """Pad the rows of inputs of ``multiply`` with zeros, to as many as ``padded_rows`` says."""
    if multiple == 1 and not steps:
        return multiply

    def run(x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2:
            return run(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        num_rows = x.shape[0]
        missing = padded_rows(num_rows, multiple, steps) - num_rows
        return multiply(F.pad(x, (0, 0, 0, missing)))[:num_rows] if missing else multiply(x)

    return run


def _product(
    data: torch.Tensor, bias: torch.Tensor | None, packed: bool, act: str, algorithm: str
) -> Multiply:
    """Return ``act(x W^T + bias)`` as a function of x.

    It runs in oneDNN, or for plain weights in torch, without activation.
    """
    if not packed:
        return lambda x: F.linear(x, data, bias)
    multiply = _multiply
    return lambda x: multiply(x, data, bias, act, [], algorithm)


FOUND: dict[tuple[int, int, torch.dtype, bool], int] = {}
"""Row multiples found so far, by (outputs, inputs, dtype, packed)."""


def _known_multiple(
    multiply: Multiply, num_outputs: int, num_inputs: int, dtype: torch.dtype, packed: bool
) -> int:
    """Return ``row_multiple`` for products of one shape, measured once on a machine."""
    key = (num_outputs, num_inputs, dtype, packed)
    if key not in FOUND:
        # Rounded to 16 bits, sums in another order differ too rarely for the measurement.
        least = 4 if packed and dtype != torch.float32 else 1
        name = f"rows {num_outputs} {num_inputs} {dtype} {packed}"
        found = findings.find(
            name,
            lambda: row_multiple(multiply, num_inputs, dtype, least) or _NONE,
            keep=lambda: _is_telling(multiply, num_inputs, dtype),
        )
        if found == _NONE:
            logger.warning(
                "on this CPU the product of a row with a %s weight of %d x %d depends on the rows "
                "beside it: answers may depend on what else is in the batch",
                str(dtype).removeprefix("torch."),
                num_outputs,
                num_inputs,
            )
        FOUND[key] = FREE_ROWS if found == _NONE else found
    return FOUND[key]


def _is_telling(multiply: Multiply, num_inputs: int, dtype: torch.dtype) -> bool:
    """Return whether products show the order of their sums, as those of zeros do not."""
    generator = torch.Generator().manual_seed(1)
    product = multiply(torch.randn(FREE_ROWS, num_inputs, generator=generator).to(dtype))
    return product.count_nonzero().item() > 0.9 * product.numel()


FUSED = {
    "gelu": ("gelu", "none"),
    "gelu_fast": ("gelu", "tanh"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}
"""Activations that oneDNN fuses into the product: name here -> its name and algorithm."""

_multiply = torch.ops.mkldnn._linear_pointwise.default
