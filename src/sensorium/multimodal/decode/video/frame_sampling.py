"""Frame sampling: the rules of the model families, as functions of integers.

A rule takes what is known of the video, what the caller asked of the loading (``media_io_kwargs``),
and from the family: what the caller asked of the processor (``mm_processor_kwargs``) and what the
checkpoint does by itself. The first of these that says anything decides; where nobody does,
``DEFAULT_NUM_FRAMES`` frames are spread evenly. With the family's part bound by
``functools.partial`` a rule is a ``processor.FrameSampler``.

Frames that come as an object of the caller's (``FrameChoice.given``) are all used unless the caller
asks for fewer. A number of frames together with a rate is the most that the rate may give. Where a
video has fewer frames than wanted, all of them are used; no frame comes twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sensorium.errors import InvalidRequestError
from sensorium.multimodal.processor import FrameChoice, VideoFacts

DEFAULT_NUM_FRAMES = 32
ALL_FRAMES = 1 << 40
"""Value of ``num_frames`` that uses all: more than any video has."""

MAX_FPS = 1000.0

EVENLY = FrameChoice(num_frames=DEFAULT_NUM_FRAMES)
NOTHING = FrameChoice()


def read_num_frames(value: Any, param: str) -> int | None:
    """A number of frames, from 1; ``ALL_FRAMES`` for -1; None for None.

    Raises InvalidRequestError for others.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise InvalidRequestError(
            f"num_frames must be an integer from 1, or -1 for all frames, got {value!r:.80}.",
            param=param,
        )
    return ALL_FRAMES if value == -1 else min(value, ALL_FRAMES)


def read_fps(value: Any, param: str) -> float | None:
    """Frames per second, above 0 and at most ``MAX_FPS``; None for None.

    Raises InvalidRequestError for others.
    """
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_FPS:
        raise InvalidRequestError(
            f"fps must be a number above 0 and at most {MAX_FPS:g}, got {value!r:.80}.",
            param=param,
        )
    return float(value)


def read_asked(options: Mapping[str, Any]) -> FrameChoice:
    """``num_frames`` and ``fps`` of ``mm_processor_kwargs``. Raises InvalidRequestError."""
    return FrameChoice(
        read_num_frames(options.get("num_frames"), "mm_processor_kwargs.num_frames"),
        read_fps(options.get("fps"), "mm_processor_kwargs.fps"),
    )


def decide(
    facts: VideoFacts, choice: FrameChoice, asked: FrameChoice, default: FrameChoice
) -> FrameChoice:
    """The wish that counts: at least one of a number and a rate.

    A rate that cannot be followed, because the video's own is not known, means all frames.
    """
    wish = next((w for w in (choice, asked) if w.num_frames is not None or w.fps is not None), None)
    if wish is None:
        wish = FrameChoice(num_frames=ALL_FRAMES) if choice.given else default
    if wish.fps is None or facts.fps is None:
        return FrameChoice(num_frames=ALL_FRAMES if wish.num_frames is None else wish.num_frames)
    return wish


def evenly(num_source: int, num_frames: int) -> np.ndarray:
    """``num_frames`` indices below ``num_source``.

    The first of each of as many ranges of equal length.
    """
    num = max(1, min(num_frames, num_source))
    return np.arange(num, dtype=np.int64) * num_source // num


def ends_included(num_source: int, num_frames: int) -> np.ndarray:
    """Return ``num_frames`` indices below ``num_source`` at equal distances, rounded.

    From the first to the last.
    """
    num = max(1, min(num_frames, num_source))
    return np.linspace(0, num_source - 1, num).round().astype(np.int64)


def uniform(
    facts: VideoFacts,
    choice: FrameChoice,
    *,
    asked: FrameChoice = NOTHING,
    default: FrameChoice = EVENLY,
) -> np.ndarray:
    """The rule of the reference's base class: evenly, so many frames or so many per second.

    Also for families whose published processors take the frames as they come (LLaVA-OneVision).
    """
    wish = decide(facts, choice, asked, default)
    return evenly(
        facts.num_frames, _capped(int(_num(facts, wish)), wish.num_frames, choice.at_most)
    )


def qwen2_vl(
    facts: VideoFacts,
    choice: FrameChoice,
    *,
    asked: FrameChoice = NOTHING,
    default: FrameChoice = EVENLY,
    multiple: int = 2,
    min_frames: int = 4,
    max_frames: int = 768,
) -> np.ndarray:
    """Qwen2-VL's and Qwen2.5-VL's rule.

    As ``uniform``, the number a multiple of ``multiple`` (frames of a temporal patch) where it is
    neither one nor that of all frames; by rate within ``min_frames`` and ``max_frames``.
    """
    wish = decide(facts, choice, asked, default)
    total = facts.num_frames
    if wish.fps is not None:
        most = min(max_frames, total) // multiple * multiple
        num = int(min(max(_num(facts, wish), min_frames), most) // multiple * multiple)
        num = _capped(num, wish.num_frames)
    else:
        num = int(_num(facts, wish))
        num = num if num == 1 else round(num / multiple) * multiple
    return evenly(total, _capped(num, choice.at_most))


def qwen3_vl(
    facts: VideoFacts,
    choice: FrameChoice,
    *,
    asked: FrameChoice = NOTHING,
    default: FrameChoice = EVENLY,
    min_frames: int = 4,
    max_frames: int = 768,
) -> np.ndarray:
    """Qwen3-VL's rule: first and last frame included.

    By rate within ``min_frames`` and ``max_frames``.
    """
    wish = decide(facts, choice, asked, default)
    num = int(_num(facts, wish))
    if wish.fps is not None:
        num = min(max(num, min_frames), max_frames)
    return ends_included(facts.num_frames, _capped(num, wish.num_frames, choice.at_most))


def minicpm_v(
    facts: VideoFacts,
    choice: FrameChoice,
    *,
    asked: FrameChoice = NOTHING,
    default: FrameChoice = FrameChoice(fps=1.0),
    max_frames: int = 64,
) -> np.ndarray:
    """MiniCPM-V's rule: every n-th frame, about ``fps`` per second.

    Where these are more than ``max_frames``, the middles of as many ranges of equal length of
    them.
    """
    wish = decide(facts, choice, asked, default)
    every = np.arange(facts.num_frames, dtype=np.int64)
    if wish.fps is not None and facts.fps is not None:
        every = every[:: max(1, round(facts.fps / wish.fps))]
        wish = FrameChoice(num_frames=min(max_frames, wish.num_frames or max_frames))
    most = max(1, _capped(len(every), wish.num_frames, choice.at_most))
    if len(every) > most:
        gap = len(every) / most
        every = every[(np.arange(most) * gap + gap / 2).astype(np.int64)]
    return every


def _num(facts: VideoFacts, wish: FrameChoice) -> float:
    """The number asked for, or what the rate gives for as long as the video lasts."""
    if wish.fps is not None and facts.fps is not None:
        return facts.num_frames / facts.fps * wish.fps
    return ALL_FRAMES if wish.num_frames is None else wish.num_frames


def _capped(num: int, *limits: int | None) -> int:
    """``num``, at most each of the limits that are set."""
    return min([num, *(limit for limit in limits if limit is not None)])
