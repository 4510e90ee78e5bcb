"""URLs in messages, without what is secret in them."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^\s'\"<>]{1,1000}@")
_QUERY = re.compile(r"(://[^\s?'\"<>]{0,1000}\?)[^\s'\"<>)]+")
_LEAST_SECRET = 4
"""Characters of the shortest password that is looked for outside of URLs."""


def without_secrets(text: str, *urls: str) -> str:
    """Return a text whose URLs have no user, password and query.

    ``urls``: those whose password and query are hidden wherever they stand in the text, as in the
    messages of libraries that show them in parts.
    """
    text = _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))
    for secret in (secret for url in urls for secret in _secrets_of(url)):
        text = text.replace(secret, HIDDEN)
    return text


def _secrets_of(url: str) -> list[str]:
    try:
        parts = urlsplit(url.rpartition("::")[2])
        found = [parts.password, unquote(parts.password or ""), parts.query]
    except ValueError:  # no URL after all
        return []
    return [secret for secret in found if secret and len(secret) >= _LEAST_SECRET]
