"""Markdown that arrives in pieces looks as if it had come at once."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sensorium.cli.chat import markdown
from sensorium.cli.chat.markdown import MarkdownAnswer, rendered

TEXT = """# Shapes

There are **three** shapes, see [here](http://example.com/a).

1. a circle
2. a square

   of two paragraphs

| colour | number |
| --- | --- |
| red | 2 |

```python
print("a")

print("b")
```

<b>not bold</b> and <image>
"""


def console(width: int = 60, height: int = 20, terminal: bool = False) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=height, force_terminal=terminal, color_system=None
    )


def text_of(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def written(text: str, size: int) -> str:
    """Return what stays on a screen that is no terminal, and so shows no frames."""
    shown = console()
    with MarkdownAnswer(shown) as answer:
        for start in range(0, len(text), size):
            answer.write(text[start : start + size])
    return text_of(shown)


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_pieces_give_the_same_as_the_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "FRAME_SECONDS", 0.0)
    monkeypatch.setattr(markdown, "BUSY", 0)
    whole = console()
    whole.print(rendered(TEXT))
    assert words(written(TEXT, size)) == words(text_of(whole))


def test_html_is_shown_and_not_dropped() -> None:
    shown = written(TEXT, 100)
    assert "<b>not bold</b>" in shown
    assert "<image>" in shown


def test_the_address_of_a_link_is_shown() -> None:
    assert "http://example.com/a" in written(TEXT, 100)


def test_blocks_that_are_complete_are_printed_at_once() -> None:
    shown = console()
    with MarkdownAnswer(shown) as answer:
        answer.write("first\n\nsecond\n\nthi")
        assert "first" in text_of(shown)
        assert "second" in text_of(shown)
        assert "thi" not in text_of(shown)


def test_a_block_longer_than_the_screen_shows_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "FRAME_SECONDS", 0.0)
    monkeypatch.setattr(markdown, "BUSY", 0)
    shown = console(height=10, terminal=True)
    with MarkdownAnswer(shown) as answer:
        answer.write("```\n")
        answer.write("".join(f"line {number}\n" for number in range(50)))
        frame = text_of(shown)
        assert "line 49" in frame
        assert "line 30" not in frame
    assert "line 30" in text_of(shown), "in the end all of it is there"


def test_thoughts_are_shown_until_the_answer_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "FRAME_SECONDS", 0.0)
    monkeypatch.setattr(markdown, "BUSY", 0)
    shown = console(terminal=True)
    with MarkdownAnswer(shown) as answer:
        answer.think("first " * 100)
        answer.think("a [bold]thought[/]")
        assert "Thinking: " in text_of(shown)
        assert "a [bold]thought[/]" in text_of(shown)
        answer.write("The answer.")
    assert "The answer." in text_of(shown).rpartition("thought")[2]
    quiet = console()
    with MarkdownAnswer(quiet) as answer:
        answer.think("a thought")
        answer.write("The answer.")
    assert words(text_of(quiet)) == ["The", "answer."], "nothing of them stays"


def test_nothing_is_left_behind_by_an_error() -> None:
    shown = console(terminal=True)
    with pytest.raises(KeyboardInterrupt), MarkdownAnswer(shown) as answer:
        answer.write("half an")
        raise KeyboardInterrupt
    assert text_of(shown).endswith("half an" + " " * 53 + "\n")
    assert "\x1b[?25h" in text_of(shown), "the cursor is shown"
