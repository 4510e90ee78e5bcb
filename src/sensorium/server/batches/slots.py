"""Places for the lines of batches: how many are read and run at a time, and may wait beside."""

from __future__ import annotations

import asyncio

WAITING_BYTES = 64 << 20
"""Bytes of lines that wait for another attempt without a slot."""


class Slots:
    """Places for ``num`` lines at a time, of one or many batches. Belongs to one event loop.

    A line is read only when it has a slot. One that waits for another attempt gives its slot to
    others while all such lines have at most ``waiting_bytes``; beyond that it keeps it.
    """

    def __init__(self, num: int, waiting_bytes: int = WAITING_BYTES) -> None:
        self.free = asyncio.Semaphore(num)
        self.left_bytes = waiting_bytes

    def slot(self) -> Slot:
        """Return the slot of one line, to be taken and given back."""
        return Slot(self)


class Slot:
    """The place of one line."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._is_held = False
        self._waiting_bytes = 0

    async def take(self) -> None:
        """Wait for the place, unless it is held."""
        if not self._is_held:
            await self._slots.free.acquire()
            self._slots.left_bytes += self._waiting_bytes
            self._is_held, self._waiting_bytes = True, 0

    def leave(self, num_bytes: int) -> bool:
        """Let others have the place while a line of ``num_bytes`` waits; False without room."""
        if self._is_held and num_bytes <= self._slots.left_bytes:
            self._slots.left_bytes -= num_bytes
            self._slots.free.release()
            self._is_held, self._waiting_bytes = False, num_bytes
        return not self._is_held

    def give_back(self) -> None:
        """End the line: let others have its place, and the room for its bytes."""
        if self._is_held:
            self._slots.free.release()
        self._slots.left_bytes += self._waiting_bytes
        self._is_held, self._waiting_bytes = False, 0
