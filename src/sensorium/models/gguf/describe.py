"""Description of a GGUF file for people: what it is, and what becomes of its weights. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from sensorium.models.gguf.reader import GgufFile

KEPT = {
    "Q4_0": "int4 in groups of 32",
    "Q4_1": "int4 in groups of 32, with minimums",
    "Q4_K": "int4 in groups of 32, with minimums",
    "Q5_1": "int8 in groups of 32, with minimums",
    "Q5_K": "int8 in groups of 32, with minimums",
    "Q5_0": "int8 in groups of 32",
    "Q8_0": "int8 in groups of 32",
    "IQ4_NL": "int8 in groups of 32",
    "IQ4_XS": "int8 in groups of 32",
}
"""Products that take the integers of a kind as they are, on CPUs that have them."""
REPACKED = ("Q2_K", "Q3_K", "Q6_K")
"""Kinds that become int8 when they are loaded."""


@dataclass(frozen=True, slots=True)
class KindUse:
    """The matrices of one kind in a file: their number, bytes and weights, and their product."""

    name: str
    number: int
    num_bytes: int
    num_weights: int

    @property
    def product(self) -> str:
        """Return how they are held in memory on a CPU with integer products."""
        if self.name in KEPT:
            return KEPT[self.name]
        return "int8, repacked" if self.name in REPACKED else "the model's data type"

    @property
    def bits(self) -> float:
        """Return about how many bits of memory a weight takes there; 16 for plain ones."""
        held = KEPT.get(self.name, "")
        if held.startswith("int4"):
            return 5.0 if "minimums" in held else 4.5
        return 8.5 if held or self.name in REPACKED else 16.0


def uses_of(file: GgufFile) -> list[KindUse]:
    """Return the kinds of a file's matrices, the one with most bytes first."""
    found: dict[str, tuple[int, int, int]] = {}
    for info in file.tensors.values():
        if len(info.shape) > 1:
            number, num_bytes, num_weights = found.get(info.kind.name, (0, 0, 0))
            own = number + 1, num_bytes + info.nbytes, num_weights + info.num_values
            found[info.kind.name] = own
    uses = [KindUse(name, *numbers) for name, numbers in found.items()]
    return sorted(uses, key=lambda use: use.num_bytes, reverse=True)


def format_of(file: GgufFile) -> str:
    """Return the format in a few words, such as ``GGUF version 3, llama: Q4_1, Q8_0``."""
    kinds = ", ".join(use.name for use in uses_of(file))
    return f"GGUF version {file.version}, {file.architecture}: {kinds}"


def products_of(file: GgufFile) -> str:
    """Return how the weights of each kind are held in memory, in words."""
    return "; ".join(f"{use.name}: {use.product}" for use in uses_of(file))


def memory_of(file: GgufFile) -> int:
    """Return about how many bytes the weights take in memory on a CPU with integer products."""
    return int(sum(use.num_weights * use.bits / 8 for use in uses_of(file)))
