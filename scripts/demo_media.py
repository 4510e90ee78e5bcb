"""Ask the demo models about images, a video and audio drawn just now; print answers and truth.

scripts/demo [--seed N] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import base64
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training.clips import draw_clip  # noqa: E402
from training.media import FPS, picture_part, sound_part, wave_file  # noqa: E402
from training.picture import Turn  # noqa: E402
from training.pictures import draw_picture  # noqa: E402
from training.sounds import draw_sound  # noqa: E402

from sensorium import LLM, SamplingParams  # noqa: E402

# Drawings, and the kinds of questions about them that the models answer most reliably.
PICTURES = {
    "shapes": ("shape", "colour"),
    "text": ("number",),
    "chart": ("bars", "bar_extreme"),
}
CLIP, CLIP_SIZE = ("motion_what", "motion_where"), (240, 180)
SOUND = ("beeps", "describe")
Medium = tuple[str, list[Turn], dict[str, Any]]
"""File name, questions, content part of the chat message."""


def picture(scene: str, folder: Path, seed: int) -> Medium:
    """Draw an image and save it as PNG."""
    drawn = draw_picture(seed, scene)
    drawn.image.save(folder / f"{scene}.png")
    turns = [turn for turn in drawn.turns if turn.kind in PICTURES[scene]]
    return f"{scene}.png", turns, picture_part(drawn.image)


def clip(folder: Path, seed: int) -> Medium:
    """Draw a video in which something moves, and save it as GIF."""
    drawn = draw_clip(seed, "moves", CLIP_SIZE)
    first, *others = drawn.frames
    path = folder / "clip.gif"
    first.save(path, save_all=True, append_images=others, duration=1000 // FPS, loop=0)
    url = "data:video/gif;base64," + base64.b64encode(path.read_bytes()).decode()
    turns = [turn for turn in drawn.turns if turn.kind in CLIP]
    return path.name, turns, {"type": "video_url", "video_url": {"url": url}}


def sound(folder: Path, seed: int) -> Medium:
    """Synthesise beeps and save them as WAV."""
    drawn = draw_sound(seed, None, "beeps")
    (folder / "sound.wav").write_bytes(wave_file(drawn.samples))
    turns = [turn for turn in drawn.turns if turn.kind in SOUND]
    return "sound.wav", turns, sound_part(drawn.samples)


def main() -> int:
    """Run the demonstration; return 0 if every answer is right, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/demo")
    parser.add_argument("--seed", type=int, help="seed of the drawings; random by default")
    parser.add_argument("--folder", type=Path, default=ROOT / "demo-media")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else secrets.randbelow(10**9)
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.WARNING)

    print(f"Images, video and audio: {folder} (--seed {seed})\n")
    pictures = [partial(picture, scene, folder) for scene in PICTURES]
    results = show("demo", [*pictures, partial(clip, folder)], seed)
    results += show("demo-audio", [partial(sound, folder)], seed)
    print(f"{sum(results)} of {len(results)} answers are right.\n")
    command = os.path.relpath(Path(sys.executable).parent / "sensorium")
    print("Serve it, with an OpenAI-compatible API:")
    print(f"    {command} serve demo          then open http://127.0.0.1:8000/")
    print("Or talk to it here:")
    print(f"    {command} chat demo --image {folder / 'shapes.png'}")
    print(f"    {command} chat demo-audio --audio {folder / 'sound.wav'}")
    return 0 if all(results) else 1


def show(model: str, makers: list[Callable[[int], Medium]], seed: int) -> list[bool]:
    """Load a model, ask one question about each item, and return which answers are right."""
    print(f"Loading {model} (the first time, kernels are compiled: up to a minute) …", flush=True)
    started = time.monotonic()
    with LLM(model=model) as llm:
        print(f"Ready after {time.monotonic() - started:.1f} s.\n")
        return [ask(llm, make, 1000 * seed + 100 * index) for index, make in enumerate(makers)]


def ask(llm: LLM, make: Callable[[int], Medium], seed: int) -> bool:
    """Ask one question about the first item from ``seed`` on that has one; True if right."""
    while True:
        name, turns, part = make(seed)
        if turns:
            break
        seed += 1
    turn = turns[0]
    message = {"role": "user", "content": [part, {"type": "text", "text": turn.question}]}
    params = SamplingParams(temperature=0, max_tokens=32)
    answer = llm.chat([message], params, use_tqdm=False)[0].outputs[0].text.strip()
    right = answer == turn.answer
    print(f"{name}")
    print(f"  question  {turn.question}")
    print(f"  answer    {answer}")
    print(f"  truth     {turn.answer}    {'right' if right else 'WRONG'}\n", flush=True)
    return right


if __name__ == "__main__":
    sys.exit(main())
