"""The site is built without a warning, and needs no other host."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

_LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(https?:)?//"
    r"|<link\b[^>]*\brel=\"?(?:stylesheet|preload|preconnect|icon)\b[^>]*\bhref=\"?(https?:)?//"
)
"""What a browser fetches by itself from another host; links that a reader follows are not meant."""
_IMPORTED = re.compile(r"url\(\s*[\"']?(?:https?:)?//|@import\s+[\"'](?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_each_page_is_there(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}


def test_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    loaded = {
        path.name: match[0]
        for path in site.rglob("*.html")
        if (match := _LOADED.search(path.read_text(encoding="utf-8")))
    }
    assert loaded == {}
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert styles
    assert not any(_IMPORTED.search(style) for style in styles)


def test_the_reference_has_the_public_names(site: Path) -> None:
    """Each with its documentation: a name without is left out by the generator."""
    import sensorium

    page = (site / "api.html").read_text(encoding="utf-8")
    names = [name for name in sensorium.__all__ if not name.startswith("__")]
    assert [name for name in names if f'.{name}"' not in page] == []
