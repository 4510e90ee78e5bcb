"""What may be kept of downloads, and for how long: RFC 9111 for a cache that serves one user, in its small form.

Kept are answers of status 200 to our requests, which differ in nothing but the URL. One is *fresh* for as long as its
``Cache-Control: max-age`` or ``Expires`` says, and then serves without a request; afterwards, and where it says
nothing, the host is asked with its ``ETag`` or ``Last-Modified`` whether it still holds. ``no-store`` is obeyed, errors
and redirects are not kept, nothing stale is ever served, freshness is never guessed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from sensorium.multimodal.cache.digest import framed
from sensorium.multimodal.fetch.disk_store import DiskStore

if TYPE_CHECKING:
    from multidict import CIMultiDict, CIMultiDictProxy

    Headers = CIMultiDict[str] | CIMultiDictProxy[str]

MAX_LIFETIME = 365 * 86400.0
_DIRECTIVE = re.compile(r'([A-Za-z0-9!#$%&\'*+.^_`|~-]+)\s*(?:=\s*("(?:[^"\\]|\\.)*"|[^,\s]*))?')
_VALIDATOR = re.compile(r"[\x20-\x7e]{1,1024}")
_VALIDATORS = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}
"""Headers of answers, and those of requests that carry them back."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A body out of the cache, with the headers that ask its host whether it still holds."""

    key: bytes
    body: bytes
    is_fresh: bool
    conditions: Mapping[str, str]


class HttpCache:
    """Bodies of downloads in a ``DiskStore``. ``clock`` gives seconds since the epoch. Thread-safe."""

    def __init__(self, store: DiskStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def get(self, url: str, listed: bool, max_bytes: int) -> Stored | None:
        """What is kept for a URL, if it has at most ``max_bytes``; reads a file.

        ``listed``: whether the guard lets this host be private. What was kept under such a rule serves only under one.
        """
        key = _key(url, listed)
        entry = self._store.get(key, max_bytes)
        if entry is None:
            return None
        is_fresh = self._clock() < entry.valid_until
        return Stored(key, entry.body, is_fresh, json.loads(entry.note))

    def put(self, url: str, listed: bool, headers: Headers, body: bytes, asked: float) -> None:
        """Keep the body of an answer if its headers allow it; it is written in another thread.

        ``asked``: when the request was sent, by the same clock.
        """
        key = _key(url, listed)
        conditions = {
            back: headers[name]
            for name, back in _VALIDATORS.items()
            if _VALIDATOR.fullmatch(headers.get(name, ""))
        }
        now = self._clock()
        valid_until = _valid_until(headers, asked, now)
        if may_store(headers) and (conditions or valid_until > now):
            self._store.put(key, json.dumps(conditions).encode(), body, valid_until)
        else:
            self._store.remove(key)

    def renew(self, stored: Stored, headers: Headers, asked: float) -> None:
        """Note that the host says (304) that a body still holds, and for how long from now."""
        if may_store(headers):
            valid_until = _valid_until(headers, asked, self._clock())
            self._store.renew(stored.key, valid_until)
        else:
            self._store.remove(stored.key)

    def close(self) -> None:
        """Wait until everything is written."""
        self._store.close()


def may_store(headers: Headers) -> bool:
    """Whether an answer may be kept beyond the requests that wait for it."""
    return "no-store" not in directives(headers) and "*" not in ",".join(headers.getall("Vary", []))


def may_reuse(headers: Headers) -> bool:
    """Whether an answer may serve those who ask a moment after it came, without its host being asked."""
    return may_store(headers) and "no-cache" not in directives(headers)


def directives(headers: Headers) -> dict[str, str]:
    """The directives of ``Cache-Control``, names in small letters, values without quotes; the first of each counts."""
    found: dict[str, str] = {}
    for line in headers.getall("Cache-Control", []):
        for match in _DIRECTIVE.finditer(line):
            found.setdefault(match[1].lower(), (match[2] or "").strip('"'))
    if not found and "no-cache" in ",".join(headers.getall("Pragma", [])).lower():
        found["no-cache"] = ""
    return found


def _valid_until(headers: Headers, asked: float, now: float) -> float:
    """Until when an answer is fresh, in seconds since the epoch; 0 when it has to be asked for each time."""
    control = directives(headers)
    if "no-cache" in control:
        return 0.0
    date = _time(headers.get("Date", ""))
    if "max-age" in control:
        lifetime = _seconds(control["max-age"])
    else:
        expires = _time(headers.get("Expires", ""))
        lifetime = 0.0 if expires is None else expires - (now if date is None else date)
    age = max(
        0.0 if date is None else now - date,
        _seconds(headers.get("Age", "")) + max(0.0, now - asked),
    )
    left = min(lifetime, MAX_LIFETIME) - age
    return now + left if left > 0 else 0.0


def _seconds(text: str) -> float:
    """A number of seconds as headers have it; 0 for anything else, which makes an answer stale."""
    text = text.strip()
    return float(text[:12]) if text.isascii() and text.isdigit() else 0.0


def _time(text: str) -> float | None:
    """Seconds since the epoch of a date in a header; None for none and for a damaged one."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _key(url: str, listed: bool) -> bytes:
    return framed("download", [url.partition("#")[0], int(listed)])
