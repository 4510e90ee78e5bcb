"""References to files, from the parts ``file`` and ``input_file`` of chat messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sensorium.config import suggestion
from sensorium.multimodal.items import FileRef
from sensorium.multimodal.parse.data import refuse
from sensorium.multimodal.parse.messages import check_uuid, media_part_type

FILE_PART_TYPES = ("file", "input_file")
_SOURCES = ("file_id", "file_data", "file_url")
_KEYS = (*_SOURCES, "filename", "detail", "uuid")
_OF_PART = ("type", "file", "uuid", "cache_control")
_LONGEST_NAME = 1024


def is_file_part(part: Mapping[str, Any]) -> bool:
    """Return true for a content part that is a file, by ``type`` or its key."""
    kind = part.get("type")
    if isinstance(kind, str):
        named = kind == "input_image" and part.get("file_id") is not None
        return kind in FILE_PART_TYPES or named
    return kind is None and "file" in part and media_part_type(part) is None


def file_from_part(part: Mapping[str, Any], param: str) -> FileRef:
    """Return the reference of a file part.

    Such a part is ``{"type": "file", "file": {…}}`` or ``{"type": "input_file", …}`` with
    ``file_id``, ``file_data`` (a ``data:`` URL or base64) or ``file_url``, and ``filename``; a
    ``file`` that is a text is a URL or path. Raises InvalidRequestError.
    """
    payload, place = part.get("file"), f"{param}.file"
    known: tuple[str, ...] = _KEYS
    if payload is None:
        payload, place, known = part, param, (*_OF_PART, *_KEYS)
    else:
        _check_keys(part, _OF_PART, param)
    if isinstance(payload, str):
        payload = {"file_url": payload}
    if not isinstance(payload, Mapping):
        refuse(
            "must be an object with 'file_id', 'file_data' or 'file_url', or a URL, got "
            f"{type(payload).__name__}",
            place,
        )
    _check_keys(payload, known, place)
    given = [key for key in _SOURCES if payload.get(key) is not None]
    if len(given) != 1:
        what = " and ".join(map(repr, given)) if given else "none of them"
        refuse(f"A file is given as one of {', '.join(_SOURCES)}; this part has {what}", place)
    [key] = given
    place = f"{place}.{key}"
    source = payload[key]
    if not isinstance(source, str) or not source:
        refuse(f"must be a non-empty string, got {type(source).__name__}", place)
    if key == "file_data" and source[:5].lower() != "data:":
        source = f"data:application/octet-stream;base64,{source}"
    name = payload.get("filename")
    if name is not None and (not isinstance(name, str) or len(name) > _LONGEST_NAME):
        refuse(f"filename must be a string of at most {_LONGEST_NAME} characters", place)
    uuid = check_uuid(part.get("uuid", payload.get("uuid")), f"{param}.uuid")
    if key == "file_id":
        return FileRef(file_id=source, filename=name or "", uuid=uuid, param=place)
    return FileRef(source=source, filename=name or "", uuid=uuid, param=place)


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], param: str) -> None:
    for key, value in given.items():
        if key not in known and value is not None:
            near = suggestion(str(key)[:80], [k for k in known if k != "type"])
            refuse(f"Unknown key {str(key)[:80]!r} in a file part.{near}", param)
