"""Validation of precomputed embeddings: torch tensors or arrays in, float32 numpy out.

torch is never imported here: a caller that passes a tensor has imported it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sensorium.errors import InvalidEmbeddingsError


def dense(value: Any, param: str) -> np.ndarray:
    """Return floating values as a C-contiguous float32 array of the same shape.

    Takes torch tensors and numpy arrays. Raises InvalidEmbeddingsError at ``param`` for other
    things, for integers, sparse, quantized, nested or meta tensors, and for NaN or infinite values.
    """
    array = _from_torch(value, param) if is_tensor(value) else value
    if not isinstance(array, np.ndarray):
        raise InvalidEmbeddingsError(
            f"Embeddings must be a torch tensor or a numpy array, got {type(value).__name__}.",
            param=param,
        )
    if array.dtype.kind != "f":
        raise InvalidEmbeddingsError(
            f"Embeddings must be of a floating type, got {array.dtype}.", param=param
        )
    with np.errstate(
        over="ignore"
    ):  # a float64 past float32 becomes infinite, and is refused below
        result = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(result).all():
        wrong = int(result.size - np.isfinite(result).sum())
        raise InvalidEmbeddingsError(
            f"Embeddings must be finite in float32; {wrong} of {result.size} values are NaN or "
            "infinite.",
            param=param,
        )
    return result


def per_item(source: Any, param: str) -> list[tuple[np.ndarray, str]]:
    """Split embeddings into one array per item, each with its place in the request.

    source: a tensor (items, features, hidden), or a list of (features, hidden). One item may also
    come as a bare (features, hidden). The caller checks the sizes.
    """
    if is_array(source):
        array = dense(source, param)
        if array.ndim == 2:
            return [(array, param)]
        if array.ndim != 3 or len(array) == 0:
            raise InvalidEmbeddingsError(
                "Embeddings must have 3 dimensions (items, features, hidden size) and at least one "
                f"item, got shape {tuple(array.shape)}. A list of (features, hidden size) works "
                "too.",
                param=param,
            )
        return [(array[i], f"{param}[{i}]") for i in range(len(array))]
    if not isinstance(source, Sequence) or isinstance(source, str | bytes) or not source:
        raise InvalidEmbeddingsError(
            "Embeddings must be a tensor (items, features, hidden size) or a list of (features, "
            f"hidden size), got {describe(source)}.",
            param=param,
        )
    return [_item(value, f"{param}[{i}]") for i, value in enumerate(source)]


def unwrapped(modality: str, source: Any, param: str) -> tuple[Any, str]:
    """Return embeddings and their place, unwrapped from a mapping with one key.

    The key is ``image_embeds`` for images, and likewise for others; sources that are not mappings
    are returned as they are. For families that need nothing beside the embeddings. Raises
    InvalidEmbeddingsError for a mapping with other keys.
    """
    if not isinstance(source, Mapping):
        return source, param
    name = f"{modality}_embeds"
    if set(source) != {name}:
        raise InvalidEmbeddingsError(
            "Embeddings for this model are a tensor, a list of tensors, or a mapping with "
            f"{name!r} alone, got one with {sorted(map(str, source))}.",
            param=param,
        )
    return source[name], f"{param}.{name}"


def check_width(array: np.ndarray, hidden_size: int, param: str) -> None:
    """Raise InvalidEmbeddingsError unless the last axis is the model's hidden size."""
    if array.shape[-1] != hidden_size:
        raise InvalidEmbeddingsError(
            f"Embeddings must have the model's hidden size {hidden_size} as their last dimension, "
            f"got shape {tuple(array.shape)}.",
            param=param,
        )


def integers(value: Any, width: int, param: str) -> list[tuple[int, ...]]:
    """Return rows of ``width`` integers each from a tensor, an array or nested lists.

    A bare row is returned as one row. Raises InvalidEmbeddingsError at ``param`` for other shapes
    and types.
    """
    array = numbers(value)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != width or not len(array) or array.dtype.kind not in "iu":
        raise InvalidEmbeddingsError(
            f"Must be integers of shape (items, {width}), got shape {tuple(array.shape)} of "
            f"{array.dtype}.",
            param=param,
        )
    return [tuple(map(int, row)) for row in array]


def numbers(value: Any) -> np.ndarray:
    """Return a tensor, an array, or a nested list that may hold some, as one array.

    It is empty (0,) where they make none: ragged, sparse and meta tensors.
    """
    is_list = isinstance(value, list | tuple)
    try:
        plain = [row.tolist() if is_array(row) else row for row in (value if is_list else [value])]
        return np.asarray(plain if is_list else plain[0])
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        return np.empty(0)


def is_tensor(value: Any) -> bool:
    """Return whether the value is a torch tensor."""
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "detach")


def is_array(value: Any) -> bool:
    """Return whether the value is a torch tensor or a numpy array."""
    return isinstance(value, np.ndarray) or is_tensor(value)


def describe(value: Any) -> str:
    """Return the type of a value, with its length if it is an empty list."""
    return (
        "an empty list" if isinstance(value, list | tuple) and not value else type(value).__name__
    )


def _item(value: Any, param: str) -> tuple[np.ndarray, str]:
    array = dense(value, param)
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2:
        raise InvalidEmbeddingsError(
            "Embeddings of one item must have 2 dimensions (features, hidden size), got shape "
            f"{tuple(array.shape)}.",
            param=param,
        )
    return array, param


def _from_torch(tensor: Any, param: str) -> np.ndarray:
    layout = str(tensor.layout).removeprefix("torch.")
    kinds = {
        layout: layout != "strided",
        "quantized": bool(getattr(tensor, "is_quantized", False)),
        "nested": bool(getattr(tensor, "is_nested", False)),
        "meta": tensor.device.type == "meta",
    }
    wrong = [name for name, found in kinds.items() if found]
    if wrong:
        raise InvalidEmbeddingsError(
            f"Embeddings must be dense tensors with values, got a {wrong[0]} one.", param=param
        )
    if not tensor.dtype.is_floating_point:
        raise InvalidEmbeddingsError(
            "Embeddings must be of a floating type, got "
            f"{str(tensor.dtype).removeprefix('torch.')}.",
            param=param,
        )
    array: np.ndarray = tensor.detach().cpu().float().numpy()
    return array
