"""Type aliases of ``multi_modal_data`` and ``multi_modal_uuids``, for annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

ModalityData: TypeAlias = Any
"""An item, a list of items, or embeddings.

Items are PIL images, arrays, tensors, frames with metadata, or samples with a rate.
"""
MultiModalDataDict: TypeAlias = Mapping[str, ModalityData]
MultiModalUUIDDict: TypeAlias = Mapping[str, Sequence[str | None] | str]
