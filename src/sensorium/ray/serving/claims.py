"""Starts of ``sensorium serve`` that have a part in an application, in the store of the cluster.

In the store, and not in the replicas: who asks gets an answer while none is up, and no replica has
to be replaced when another start comes. Each start writes an entry of its own, so two at once lose
none.
"""

from __future__ import annotations

import time

from ray.experimental import internal_kv

_NAMESPACE = b"sensorium"
_STALE_SECONDS = 60.0
"""Age of an entry whose application is not there, after which its start has been killed."""


class Claims:
    """Entries of starts in the application ``name``; ``owner`` is the start that asks."""

    def __init__(self, name: str, owner: str) -> None:
        self._prefix = f"serve:{name}:starts:"
        self._ending = f"serve:{name}:ending"
        self._own = f"{self._prefix}{owner}"

    def add(self, *, application_there: bool) -> bool:
        """Note the own start; return True when another one is ending the application just now.

        Entries of starts that were killed go where no application is there.
        """
        if not application_there:
            for key, begun in self._entries().items():
                if time.time() - begun > _STALE_SECONDS:
                    internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
        internal_kv._internal_kv_put(self._own, repr(time.time()), namespace=_NAMESPACE)
        return bool(internal_kv._internal_kv_del(self._ending, namespace=_NAMESPACE))

    def remove(self) -> bool:
        """Take the own entry back; return True when no other one is there."""
        internal_kv._internal_kv_del(self._own, namespace=_NAMESPACE)
        return not self._entries()

    def are_latest(self) -> bool:
        """Return whether no other start has come after the own one."""
        entries = self._entries()
        own = self._own.encode()
        return own in entries and max(entries, key=lambda key: (entries[key], key)) == own

    def end(self) -> bool:
        """Say that the own start ends the application; False when another one has taken over."""
        if not self.are_latest():
            return False
        internal_kv._internal_kv_put(self._ending, b"1", namespace=_NAMESPACE)
        # Another start either sees the mark, or is seen here.
        if self.are_latest():
            return True
        internal_kv._internal_kv_del(self._ending, namespace=_NAMESPACE)
        return False

    def clear(self) -> None:
        """Forget the own start and those before it: the application is ended."""
        entries = self._entries()
        own = self._own.encode()
        last = (entries.get(own, 0.0), own)
        for key in (own, *(key for key, begun in entries.items() if (begun, key) < last)):
            internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
        internal_kv._internal_kv_del(self._ending, namespace=_NAMESPACE)

    def _entries(self) -> dict[bytes, float]:
        """Return when each start came, by its key, in seconds since the epoch."""
        found = {}
        for key in internal_kv._internal_kv_list(self._prefix, namespace=_NAMESPACE):
            value = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
            if value is not None:
                found[key] = float(value)
        return found
