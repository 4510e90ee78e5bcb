"""Hook of mkdocs: includes files of the repository, and mends links to files outside ``docs/``.

Pages are read in two places: in the repository, where a link such as ``../examples/offline.py``
works, and on the site, where it does not. On the site such a link leads to the repository's host
when mkdocs.yml has ``repo_url``, and is plain text otherwise. A link to a file that is not there is
a warning, which fails the strict build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r'^--8<-- "(?P<file>[^"]+)"$', re.MULTILINE)
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^()\s:#]+)(?P<anchor>#[^()\s]*)?\)")
log = logging.getLogger("mkdocs.plugins.docs_links")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Return the page with its included files and with links that work on the site."""
    source = page.file.src_uri

    def included(match: re.Match[str]) -> str:
        text = (ROOT / match["file"]).read_text(encoding="utf-8")
        return mended(text, match["file"], source, config.repo_url)

    return INCLUDE.sub(included, mended(markdown, f"docs/{source}", source, config.repo_url))


def mended(markdown: str, file: str, page: str, repo_url: str | None) -> str:
    """Return the text of ``file``, shown on ``page``, with links that work there."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), match["target"]))
        if not (ROOT / target).exists():
            log.warning("%s links to %s, which is not there", file, target)
        anchor = match["anchor"] or ""
        if target.startswith("docs/") and target.endswith(".md"):
            inside = posixpath.relpath(target, posixpath.dirname(f"docs/{page}"))
            return f"[{match['text']}]({inside}{anchor})"
        if repo_url:
            return f"[{match['text']}]({repo_url.rstrip('/')}/blob/main/{target}{anchor})"
        return match["text"]

    return LINK.sub(link, markdown)
