"""Uploads that a conversation names by their id."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sensorium.multimodal.items import FileRef
from sensorium.server.files.store import FileStore

if TYPE_CHECKING:
    from sensorium.text.chat.chat_template import Conversation


def with_uploads(conversation: Conversation, store: FileStore, tenant: str) -> Conversation:
    """Return the conversation with the content of its uploads at hand.

    Callable from any thread. Raises NotFoundError for an id that no file of the tenant has.
    """
    if all(file.file_id is None for file in conversation.files):
        return conversation
    return conversation.with_files([[_found(file, store, tenant)] for file in conversation.files])


def _found(file: FileRef, store: FileStore, tenant: str) -> FileRef:
    if file.file_id is None:
        return file
    stored = store.get(file.file_id, tenant, file.param or None)
    return dataclasses.replace(
        file,
        read=stored.read,
        num_bytes=stored.num_bytes,
        filename=file.filename or stored.filename,
    )
