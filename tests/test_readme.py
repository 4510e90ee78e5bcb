"""The README: short, its links lead somewhere, and its code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from training.pictures import draw_picture

from tests.docs.pages import blocks_of
from tests.docs.running import Page, Servers

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 130


@pytest.mark.parametrize("link", sorted(set(LINK.findall(TEXT))))
def test_a_link_leads_to_a_file_of_the_repository(link: str) -> None:
    name, _, anchor = link.partition("#")
    page = ROOT / name
    assert page.is_file()
    assert not anchor or anchor in anchors(page)


def test_every_page_of_the_docs_is_linked() -> None:
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {link.partition("#")[0] for link in LINK.findall(TEXT)}


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Images as scripts/demo draws them, in the current folder; what each shows, by file."""
    monkeypatch.chdir(tmp_path)
    Path("demo-media").mkdir()
    shown = {}
    for scene, kind, seed in (("shapes", "describe", 298), ("text", "number", 10)):
        image = draw_picture(seed, scene, (320, 240))
        image.image.save(f"demo-media/{scene}.png")
        shown[scene] = next(turn.answer for turn in image.turns if turn.kind == kind)
    return shown


@pytest.mark.slow
def test_its_code_runs_and_answers_rightly(
    drawn: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = Servers(tmp_path)
    page = Page(servers)
    try:
        for block in blocks_of("README.md"):
            page.run(block)
    finally:
        page.close()
        servers.stop()
    assert capsys.readouterr().out.split("\n")[:2] == [drawn["shapes"], drawn["text"]]
