"""References to media items, from ``multi_modal_data`` and from the parts of chat messages.

Nothing is loaded here; mistakes that show without loading are refused here, with their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from sensorium.config import suggestion
from sensorium.errors import counted
from sensorium.multimodal.cache import digest
from sensorium.multimodal.decode.image import ImageFeatureData, ImagePixelData
from sensorium.multimodal.items import MODALITIES, MediaRef, Modality, SourceKind, is_tensor
from sensorium.multimodal.parse import part_options
from sensorium.multimodal.parse.data import (
    AUDIO,
    IMAGES,
    VIDEOS,
    Kind,
    Source,
    are_numbers,
    refuse,
    split,
    warn_of_deprecated_names,
)

MAX_UUID_LENGTH = 1024
"""Length of an id that is kept as it is."""


# --- multi_modal_data -----------------------------------------------------------------------------


def refs_from_data(
    data: object,
    uuids: object = None,
    *,
    enable_mm_embeds: bool = False,
    param: str = "multi_modal_data",
    uuids_param: str = "multi_modal_uuids",
) -> list[MediaRef]:
    """Return the references of ``multi_modal_data`` and its uuids, modality by modality.

    ``enable_mm_embeds`` decides one reading only: a bare floating-point tensor of three dimensions
    is embeddings ``(num_items, feature_size, hidden_size)`` if they are enabled, else a CHW image
    if it has three channels. Raises InvalidRequestError with ``param`` such as
    ``multi_modal_data.image[1]``.
    """
    if isinstance(data, ImageFeatureData):
        data = {"image": data.content}
    elif isinstance(data, ImagePixelData):
        data = {"image": _images(data.content)}
    items = _modality_mapping(data, param)
    names = _modality_mapping(uuids, uuids_param)
    refs: list[MediaRef] = []
    for modality, value in items.items():
        sources = split(value, f"{param}.{modality}", enable_mm_embeds, _KINDS[modality])
        if uuids is None:
            refs.extend(source.ref(modality) for source in sources)
            continue
        if modality not in names:
            refuse(
                f"There is no entry {modality!r}; every modality of multi_modal_data needs one in "
                "multi_modal_uuids, with as many entries as items (None for those without an id)",
                uuids_param,
            )
        refs.extend(_with_uuids(modality, sources, names[modality], f"{uuids_param}.{modality}"))
    for modality in names:
        if modality not in items:
            refuse(
                f"There are ids for {modality!r}, but multi_modal_data has no {modality!r}; pass "
                "None there for each cached item",
                f"{uuids_param}.{modality}",
            )
    for ref in refs:
        if ref.kind == "cached" and ref.uuid is None:
            refuse("There is neither data nor an id (multi_modal_uuids) for this item", ref.param)
    return refs


def _images(content: Any) -> list[Any]:
    """Return the images of a deprecated ``ImagePixelData``: one, or a batch of 4 dimensions."""
    is_batch = (isinstance(content, np.ndarray) or is_tensor(content)) and content.ndim == 4
    return list(content) if is_batch else [content]


def _modality_mapping(value: object, param: str) -> dict[Modality, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        refuse(f"must be a mapping such as {{'image': …}}, got {type(value).__name__}", param)
    for key in value:
        if key not in MODALITIES:
            name = str(key)[:80]
            near = suggestion(name, list(MODALITIES))
            refuse(
                f"Unknown modality {name!r}; known are {', '.join(MODALITIES)}.{near}",
                f"{param}.{name}",
            )
    return {key: value[key] for key in value}


_KINDS: dict[Modality, Kind] = {
    "image": IMAGES,
    "video": VIDEOS,
    "audio": AUDIO,
}
"""Rules for items of each modality that are objects."""


def _with_uuids(
    modality: Modality, sources: Sequence[Source], uuids: object, param: str
) -> list[MediaRef]:
    entries = list(uuids) if isinstance(uuids, list | tuple) else [uuids]
    ids = [check_uuid(entry, f"{param}[{i}]") for i, entry in enumerate(entries)]
    if len(sources) == 1 and sources[0].kind == "embeds" and len(ids) > 1:
        # The processor finds the number of items when it reads the embeddings.
        source = sources[0]
        return [MediaRef(modality, source.kind, source.content, None, source.param, tuple(ids))]
    if len(ids) != len(sources):
        refuse(
            f"There {'is' if len(ids) == 1 else 'are'} {counted(len(ids), 'id')} for "
            f"{counted(len(sources), f'{modality} item')}; pass one per item (None for those "
            "without an id)",
            param,
        )
    return [source.ref(modality, uuid) for source, uuid in zip(sources, ids, strict=True)]


def check_uuid(value: object, param: str) -> str | None:
    """Return a caller's id for an item, or None. Long ids, such as data: URLs, become their digest.

    Raises InvalidRequestError for other values than a non-empty string or None.
    """
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        refuse(f"An id must be a non-empty string or null, got {value!r:.80}", param)
    if len(value) > MAX_UUID_LENGTH:
        return f"{len(value)} characters, {digest.text_digest(value).hex()}"
    return value


# --- parts of chat messages -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _PartType:
    modality: Modality
    payload: Literal["url", "image", "embeds", "base64"]
    keys: tuple[str, ...]


def _part_type(
    modality: Modality, payload: Literal["url", "image", "embeds", "base64"], *keys: str
) -> _PartType:
    return _PartType(modality, payload, keys)


_PART_TYPES: dict[str, _PartType] = {
    "image_url": _part_type("image", "url", "image_url"),
    "input_image": _part_type("image", "url", "input_image", "image_url"),
    "image_pil": _part_type("image", "image", "image_pil"),
    "image_embeds": _part_type("image", "embeds", "image_embeds"),
    "video_url": _part_type("video", "url", "video_url"),
    "video": _part_type("video", "url", "video"),
    "video_embeds": _part_type("video", "embeds", "video_embeds"),
    "audio_url": _part_type("audio", "url", "audio_url"),
    "input_audio": _part_type("audio", "base64", "input_audio"),
    "audio_embeds": _part_type("audio", "embeds", "audio_embeds"),
}

MEDIA_PART_TYPES: tuple[str, ...] = tuple(_PART_TYPES)
"""Values of ``type`` that name a media part of a chat message."""


_PAYLOAD_KEYS: dict[str, tuple[str, ...]] = {
    "url": ("url", "uuid", "detail", "format"),
    "image": (),
    "base64": ("data", "format", "uuid"),
}
"""Keys of a payload that is an object, besides options."""


def media_part_type(part: Mapping[str, Any]) -> str | None:
    """Return the media type of a content part, by ``type`` or payload key; None for others."""
    kind = part.get("type")
    if kind is not None:
        return kind if isinstance(kind, str) and kind in _PART_TYPES else None
    return next((name for name in _PART_TYPES if name in part), None)


def ref_from_part(part: Mapping[str, Any], param: str) -> MediaRef:
    """Return the reference of a media part.

    Such a part is ``{"type": "image_url", "image_url": {"url": …}, "uuid": …}``. ``param`` is its
    own place (``messages[0].content[1]``), to which the payload's key is added. A payload of None
    with a ``uuid`` names a cached item. ``part_options`` in the part or in its payload are for this
    item alone. Raises InvalidRequestError, for unknown keys as well.
    """
    name = media_part_type(part)
    if name is None:
        refuse(
            f"Unknown type of content part {part.get('type')!r:.80}; media parts are "
            f"{', '.join(MEDIA_PART_TYPES)}.{suggestion(str(part.get('type')), list(_PART_TYPES))}",
            param,
        )
    kind = _PART_TYPES[name]
    key = next((key for key in kind.keys if key in part), kind.keys[0])
    uuid = check_uuid(part.get("uuid"), f"{param}.uuid")
    payload = part.get(key)
    place = f"{param}.{key}"
    known = () if kind.payload == "embeds" else part_options.names(kind.modality)
    options = part_options.select(part, ("type", "uuid", *kind.keys), known, param)
    detail, detail_place = part.get("detail"), f"{param}.detail"
    if isinstance(payload, Mapping) and kind.payload != "embeds":
        if payload.get("detail") is not None:
            detail, detail_place = payload["detail"], f"{place}.detail"
        uuid = uuid or check_uuid(payload.get("uuid"), f"{place}.uuid")
        options |= part_options.select(payload, _PAYLOAD_KEYS[kind.payload], known, place)
        if kind.payload == "url":
            payload = payload.get("url")
    processing, loading = part_options.by_use(kind.modality, options, param)
    if kind.modality == "image" and kind.payload == "url":
        loading |= part_options.bound_of_detail(detail, detail_place)
    if payload is None and uuid is None:
        refuse(
            f"The part has no {key!r}; only a part with a 'uuid' of a cached item may leave it out",
            place,
        )
    source_kind, source = _PAYLOADS["none" if payload is None else kind.payload](payload, place)
    return MediaRef(
        kind.modality,
        source_kind,
        source,
        uuid,
        place,
        alone=True,
        processing=processing,
        loading=loading,
    )


def _url_payload(payload: object, param: str) -> tuple[SourceKind, Any]:
    if not isinstance(payload, str):
        refuse(
            f"must be a URL or an object with 'url', got {type(payload).__name__}",
            param,
        )
    if not payload:
        refuse("The URL is empty", param)
    return "url", payload


def _image_payload(payload: object, param: str) -> tuple[SourceKind, Any]:
    if not isinstance(payload, Image.Image):
        refuse(f"must be a PIL.Image, got {type(payload).__name__}", param)
    return "object", payload


def _embeds_payload(payload: object, param: str) -> tuple[SourceKind, Any]:
    is_object = isinstance(payload, Mapping)
    members = list(payload.values()) if isinstance(payload, Mapping) else [payload]
    known = (_is_text_or_tensor(m) or (is_object and _is_list_of_embeddings(m)) for m in members)
    if not members or not all(known):
        refuse(
            "must be a tensor, base64 of a safetensors or torch.save file, or an object of those "
            "(sizes in it may be lists of integers)",
            param,
        )
    warn_of_deprecated_names(payload)
    return "embeds", payload


def _is_text_or_tensor(value: object) -> bool:
    return isinstance(value, str) or is_tensor(value)


def _is_list_of_embeddings(value: object) -> bool:
    """Return whether a value holds numbers, or is a list of tensors or of their files."""
    return are_numbers(value) or (
        isinstance(value, list | tuple) and bool(value) and all(map(_is_text_or_tensor, value))
    )


def _base64_payload(payload: object, param: str) -> tuple[SourceKind, Any]:
    data = payload.get("data") if isinstance(payload, Mapping) else None
    form = payload.get("format", "wav") if isinstance(payload, Mapping) else None
    if not isinstance(data, str) or not isinstance(form, str) or not form.isalnum():
        refuse("must be an object with 'data' (base64) and 'format' (such as wav)", param)
    return "url", f"data:audio/{form};base64,{data}"


_PAYLOADS: dict[str, Callable[[object, str], tuple[SourceKind, Any]]] = {
    "none": lambda payload, param: ("cached", None),
    "url": _url_payload,
    "image": _image_payload,
    "embeds": _embeds_payload,
    "base64": _base64_payload,
}
