"""Static files of the playground, read once. Their addresses have a digest of all of them.

A browser may keep a file for ever: what changes gets another address. Modules name each other by
relative paths, so one digest stands for the whole folder.
"""

from __future__ import annotations

import functools
import gzip
import html
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

FOLDER = Path(__file__).parent / "static"
PAGE = "index.html"
PREFIX = "/playground"
ASSETS_MARK = "{{assets}}"
PRELOADS_MARK = "{{preloads}}"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file: its bytes, the same compressed, and its media type."""

    data: bytes
    gzipped: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class Assets:
    """All files but the page, by their path in the folder, and the page with gaps for addresses."""

    digest: str
    files: dict[str, Asset]
    page: str

    def address(self, name: str) -> str:
        """Return the path of a file on the server."""
        return f"{PREFIX}/{self.digest}/{name}"

    @property
    def paths(self) -> frozenset[str]:
        """Paths of all files on the server."""
        return frozenset(map(self.address, self.files))

    def page_at(self, root_path: str) -> str:
        """Return the page of a server whose paths begin with ``root_path``."""
        base = html.escape(f"{root_path}{PREFIX}/{self.digest}")
        modules = sorted(name for name in self.files if name.endswith(".js"))
        preloads = "\n".join(f'<link rel="modulepreload" href="{base}/{name}">' for name in modules)
        return self.page.replace(ASSETS_MARK, base).replace(PRELOADS_MARK, preloads)


@functools.cache
def load_assets() -> Assets:
    """Read the folder."""
    names = sorted(
        str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.suffix in _TYPES
    )
    page = (FOLDER / PAGE).read_text("utf-8")
    hasher = blake3(page.encode())
    files = {}
    for name in names:
        data = (FOLDER / name).read_bytes()
        hasher.update(f"{name}\0{len(data)}\0".encode() + data)
        files[name] = Asset(data, gzip.compress(data, 9, mtime=0), _TYPES[Path(name).suffix])
    return Assets(hasher.hexdigest(length=8), files, page)
