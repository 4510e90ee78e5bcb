"""Pages of the documentation whose tables are written from the newest results."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown: a column of names, then columns of figures."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def filled(page: str, sections: Mapping[str, Callable[[], str]]) -> str:
    """Return the page with what lies between the marks of each section written anew.

    The marks are ``<!-- name -->`` and ``<!-- end of name -->``; a page need not have all.
    """
    for name, write in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, found, rest = page.partition(begin)
        if found:
            tail = rest.partition(end)[2]
            page = f"{head}{begin}\n\n{write()}\n\n{end}{tail}"
    return page


def main(description: str, module: str, page: Path, fill: Callable[[str], str]) -> int:
    """Run the command line of a module that fills a page.

    Return the exit status: with ``--check``, 1 if the page is out of date.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    parser.add_argument("--page", type=Path, default=page)
    options = parser.parse_args()
    text = options.page.read_text(encoding="utf-8")
    new = fill(text)
    if not options.check:
        options.page.write_text(new, encoding="utf-8")
    elif new != text:
        print(f"{options.page.name} is out of date: run python -m {module}")
        return 1
    return 0
