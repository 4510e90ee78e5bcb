"""Identity of media: 32-byte BLAKE3 digests over framed and tagged fields.

Each field is hashed after its length and each kind of content after a tag of its own, so that
different inputs never give the same bytes to hash: 30 x 100 and 100 x 30 pixels, a palette and
equal grey values, an orientation in the metadata and none. The digest of an item covers its content
(or the caller's id), the loading options and the processor's identity: items with equal digests
have equal features.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from blake3 import blake3
from PIL import Image

from sensorium.multimodal.decode import grey
from sensorium.multimodal.decode import image as images
from sensorium.multimodal.items import Features, Modality, Page, is_tensor

Field = bytes | str | int | memoryview


def framed(tag: str, fields: Iterable[Field]) -> bytes:
    """Hash ``tag`` and ``fields``, each as type letter, length (8 bytes little-endian), content."""
    hasher = blake3()
    for field in (tag, *fields):
        letter, content = _encode(field)
        hasher.update(letter + len(content).to_bytes(8, "little"))
        hasher.update(content)
    return hasher.digest()


def _encode(field: Field) -> tuple[bytes, bytes | memoryview]:
    if isinstance(field, str):
        return b"s", field.encode("utf-8", "surrogatepass")
    if isinstance(field, int):
        return b"i", str(int(field)).encode("ascii")
    if isinstance(field, memoryview):
        return b"b", field.cast("B")
    return b"b", field


def encoded_digest(data: bytes) -> bytes:
    """Return the content digest of an encoded file."""
    return framed("encoded", [data])


def text_digest(text: str) -> bytes:
    """Return the digest of a ``data:`` URL's text, which recognises it without decoding it."""
    return framed("text", [text])


def object_digest(source: Any) -> bytes:
    """Return the content digest of a PIL image, an array, a tensor, or a list or pair of those.

    It covers kind, type, shape and every byte. Lists and pairs may hold plain values and mappings,
    too (frames with metadata, samples with their rate). Raises MediaUndecodableError if a lazily
    opened PIL image cannot be read.
    """
    if isinstance(source, Image.Image):
        return _pil_digest(source)
    if isinstance(source, np.ndarray):
        return framed("numpy", _array_fields(source))
    numbers = _numbers(source)
    if numbers is not None:
        return framed("numbers", _array_fields(numbers))
    if isinstance(source, list | tuple):
        return framed("list", [object_digest(member) for member in source])
    if is_tensor(source):
        return framed("torch", _tensor_fields(source))
    return framed("plain", [canonical(source)])


def page_digest(page: Page) -> bytes:
    """Return the content digest of a page of a PDF, in the size in which it is drawn."""
    return framed("page", [page.document.digest, page.index, *page.document.sizes[page.index]])


def features_digest(features: Features) -> bytes:
    """Return the content digest of precomputed embeddings: named arrays and metadata."""
    fields: list[Field] = [features.modality, features.num_embeds]
    for name in sorted(features.arrays):
        fields += [name, *_array_fields(features.arrays[name])]
    return framed("features", [*fields, canonical(dict(features.meta))])


def uuid_digest(modality: Modality, uuid: str, *, tenant: str, salt: str) -> bytes:
    """Return a content digest for a caller's id, within the namespace of tenant and salt."""
    return framed("uuid", [modality, tenant, salt, uuid])


def item_digest(
    modality: Modality, content: bytes, options: Mapping[str, Any], identity: bytes
) -> bytes:
    """Return the digest of an item, over content digest, options and the processor's identity."""
    return framed("item", [modality, content, canonical(dict(options)), identity])


def canonical(value: Any) -> str:
    """Return a text that is the same for equal plain values only, in any order of keys."""
    if isinstance(value, Mapping):
        members = sorted((repr(key), canonical(value[key])) for key in value)
        return "{" + ",".join(f"{key}:{member}" for key, member in members) + "}"
    if isinstance(value, list | tuple | range):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, np.ndarray):
        return f"array({framed('numpy', _array_fields(value)).hex()})"
    if is_tensor(value):
        return f"tensor({framed('torch', _tensor_fields(value)).hex()})"
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bytes | int | float):
        return repr(value)
    raise TypeError(f"no canonical form for {type(value).__name__}")


def _numbers(source: Any) -> np.ndarray | None:
    """Return nested lists of numbers as an array: samples are too many to hash one by one."""
    first = source
    while isinstance(first, list) and first:
        first = first[0]
    if first is source or not isinstance(first, int | float):
        return None
    try:
        array = np.asarray(source)
    except (ValueError, OverflowError):  # lists of different lengths
        return None
    return array if array.dtype.kind in "iuf" else None


def _array_fields(array: np.ndarray) -> list[Field]:
    return [array.dtype.str, *_shape_fields(array.shape), _bytes_of(array)]


def _tensor_fields(tensor: Any) -> list[Field]:
    torch = sys.modules["torch"]
    dense = tensor.detach().cpu().contiguous()
    content = dense.reshape(-1).view(torch.uint8).numpy()
    return [str(tensor.dtype), *_shape_fields(tuple(tensor.shape)), _bytes_of(content)]


def _shape_fields(shape: tuple[int, ...]) -> list[Field]:
    return [len(shape), *shape]


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _pil_digest(image: Image.Image) -> bytes:
    images.load(image)
    palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
    return framed(
        "pil",
        [
            image.mode,
            image.width,
            image.height,
            canonical(palette),
            canonical(image.info.get("transparency")),
            images.orientation(image),
            *(grey.facts_of(image) if image.mode in grey.MODES else []),
            image.tobytes(),
        ],
    )
