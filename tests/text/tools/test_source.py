"""Text that is read while it comes."""

from __future__ import annotations

import time

import pytest

from sensorium.text.tools.source import Source


def up_to(pieces: list[str], most: int) -> tuple[str | None, int]:
    """What ``up_to`` returns for ">", and the position after it."""
    source = Source()
    reading = source.up_to(">", most)
    for piece in pieces:
        source.append(piece)
        try:
            next(reading)
        except StopIteration as stop:
            return stop.value, source.pos
    source.ended = True
    with pytest.raises(StopIteration) as stopped:
        next(reading)
    return stopped.value.value, source.pos


@pytest.mark.parametrize(
    ("text", "most", "found"),
    [
        ("abc>d", 3, ("abc", 4)),
        ("abc>d", 9, ("abc", 4)),
        (">", 3, ("", 1)),
        ("abcd>", 3, (None, 0)),
        ("abc", 3, (None, 0)),
        ("", 3, (None, 0)),
    ],
)
def test_a_text_is_found_within_a_number_of_characters(
    text: str, most: int, found: tuple[str | None, int]
) -> None:
    assert up_to([text], most) == found
    assert up_to(list(text), most) == found


def seconds(source: Source) -> float:
    """Processor time of many searches, the least of several."""
    times = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(1000):
            next(source.up_to(">", 256), None)
        times.append(time.process_time() - start)
    return min(times)


def test_text_behind_those_characters_is_not_looked_at() -> None:
    """Else calls that begin and do not go on would take quadratic time."""
    short, long = Source(), Source()
    short.append("<function=" * 100)
    long.append("<function=" * 1_000_000)
    # All of the longer one is ten thousand times as much.
    assert seconds(long) < 20 * seconds(short)
