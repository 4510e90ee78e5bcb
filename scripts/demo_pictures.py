"""Draws three new pictures, asks the demo model about them offline, and prints question, answer and truth.

scripts/demo [--seed N] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training.pictures import draw_picture  # noqa: E402

from sensorium import LLM, SamplingParams  # noqa: E402

# What to draw, and which of the questions about it to ask: those that the model's card finds most reliable.
SCENES = (
    ("shapes", ("shape", "colour")),
    ("text", ("number",)),
    ("chart", ("bars", "bar_extreme")),
)


def main() -> int:
    """Run the demonstration; the exit status says whether every answer was right."""
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/demo")
    parser.add_argument("--seed", type=int, help="draw the same pictures again; new ones without")
    parser.add_argument("--folder", type=Path, default=ROOT / "demo-pictures")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else secrets.randbelow(10**9)
    args.folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.WARNING)

    print(
        "Loading the demo model (the first time, kernels are compiled: up to a minute) …",
        flush=True,
    )
    started = time.monotonic()
    with LLM(model="demo") as llm:
        print(
            f"Ready after {time.monotonic() - started:.1f} s. Pictures: {args.folder} (--seed {seed})\n"
        )
        right = sum(ask(llm, index, seed, args.folder) for index in range(len(SCENES)))
    print(f"{right} of {len(SCENES)} answers are right.\n")
    command = os.path.relpath(Path(sys.executable).parent / "sensorium")
    print("Serve it, with an OpenAI-compatible API:")
    print(f"    {command} serve demo          then open http://127.0.0.1:8000/")
    print("Or talk to it here:")
    print(f"    {command} chat demo --image {args.folder / 'shapes.png'}")
    return 0 if right == len(SCENES) else 1


def ask(llm: LLM, index: int, seed: int, folder: Path) -> bool:
    """Draw a picture of one kind, ask one question about it; whether the answer was right."""
    scene, kinds = SCENES[index]
    candidate = 1000 * seed + 100 * index
    while True:
        picture = draw_picture(candidate, scene)
        turns = [turn for turn in picture.turns if turn.kind in kinds]
        if turns:
            break
        candidate += 1
    turn = turns[0]
    path = folder / f"{scene}.png"
    picture.image.save(path)
    message = {
        "role": "user",
        "content": [
            {"type": "image_pil", "image_pil": picture.image},
            {"type": "text", "text": turn.question},
        ],
    }
    params = SamplingParams(temperature=0, max_tokens=32)
    answer = llm.chat([message], params, use_tqdm=False)[0].outputs[0].text.strip()
    right = answer == turn.answer
    print(f"{path.name}")
    print(f"  question  {turn.question}")
    print(f"  answer    {answer}")
    print(f"  truth     {turn.answer}    {'right' if right else 'WRONG'}\n", flush=True)
    return right


if __name__ == "__main__":
    sys.exit(main())
