"""Measure the demo models on held-out images, videos and sounds by exact answers.

    python -m training.evaluate --engine reference    # images, through transformers
    python -m training.evaluate                       # images and videos, through this project
    python -m training.evaluate --speech SPEECH.npz   # the model for sounds
    python -m training.evaluate --front-ends          # images, with what front ends add

prints a table of the share of right answers per kind of question, and with ``--card FILE`` puts it
between the marks in the model card.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from PIL import Image

from training import sounds
from training.clips import draw_clip
from training.front_ends import FORMS, HELD_OUT_FORMS, Noise
from training.lettering import FAMILIES, HELD_OUT_FAMILIES
from training.media import clip_part, picture_part, sound_part
from training.picture import Turn
from training.pictures import GRIDS, choose_size, draw_picture, small_talk
from training.speech import Speech

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "sensorium"
DEMO, DEMO_AUDIO = PACKAGE / "demo", PACKAGE / "demo_audio"
FIRST_SEED = 5 * 10**15
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
BEGIN_FRONT_ENDS, END_FRONT_ENDS = "<!-- front ends -->", "<!-- end of front ends -->"
HEADS = ("about", "question")
LOOK, READ = ("shape", "colour", "count", "position"), ("word", "number", "spelling")
#: Sets of images as (name, generator's scene, size in pixels or None for trained sizes, font
#: families, kinds of questions or None for all).
SETS = (
    ("shapes", "shapes", None, FAMILIES, None),
    ("text", "text", None, FAMILIES, None),
    ("chart", "chart", None, FAMILIES, None),
    ("shapes, 448x448", "shapes", (448, 448), FAMILIES, LOOK),
    ("text, 640x480", "text", (640, 480), FAMILIES, READ),
    ("text, font never seen", "text", None, HELD_OUT_FAMILIES, READ),
)
#: Sets of videos as (name, size in pixels or None for trained sizes).
CLIP_SETS = (("clips", None), ("clips, 320x240", (320, 240)))
#: Sets of sounds as (name, generator's scenes, set of voices).
SOUND_SETS = (
    ("tones", ("tone",), "trained"),
    ("beeps", ("beeps",), "trained"),
    ("noise, silence", ("noise",), "trained"),
    ("eSpeak voices never heard", ("word", "digits"), "espeak"),
    ("Flite voice never heard", ("word", "digits"), "flite"),
)


class Question(NamedTuple):
    """One question to put, and the truth; ``media``: an image, the frames of a video, samples.

    With ``noise`` it is put as a front end does it: noise around it, and the medium after the text.
    """

    group: str
    kind: str
    media: Any
    text: str
    answer: str
    noise: Noise | None = None


Answerer = Callable[[list[Question]], list[str]]


def draw_questions(count: int, first: int = FIRST_SEED) -> list[Question]:
    """About ``count`` questions for each of ``SETS``, and some without an image."""
    questions = []
    for number, (group, scene, size, families, kinds) in enumerate(SETS):
        seed = first + number * 10**9
        left = count * (3 if group == "shapes" else 1)
        while left > 0:
            seed += 1
            rng = Random(seed)
            grid = rng.choices(list(GRIDS), list(GRIDS.values()))[0]
            if grid[0] == 2 and scene != "text":
                continue
            picture = draw_picture(seed, scene, size or choose_size(rng, grid), families)
            turns = [turn for turn in picture.turns[:4] if kinds is None or turn.kind in kinds]
            questions += _asked(group, picture.image, turns)
            left -= len(turns)
    rng = Random(first)
    return questions + _asked("no picture", None, [small_talk(rng) for _ in range(40)])


def _asked(group: str, media: Any, turns: list[Turn]) -> list[Question]:
    return [Question(group, turn.kind, media, turn.question, turn.answer) for turn in turns]


def draw_clip_questions(count: int, first: int = FIRST_SEED) -> list[Question]:
    """About ``count`` questions for each of ``CLIP_SETS``."""
    questions: list[Question] = []
    for number, (group, size) in enumerate(CLIP_SETS):
        seed, end = first + number * 10**9, len(questions) + count
        while len(questions) < end:
            seed += 1
            clip = draw_clip(seed, size=size)
            questions += _asked(group, clip.frames, clip.turns[:4])
    return questions


def draw_sound_questions(speech: Speech, count: int, first: int = FIRST_SEED) -> list[Question]:
    """About ``count`` questions for each of ``SOUND_SETS``, and some without a sound."""
    questions: list[Question] = []
    for number, (group, scenes, speaker) in enumerate(SOUND_SETS):
        seed, end = first + number * 10**9, len(questions) + count
        while len(questions) < end:
            seed += 1
            sound = sounds.draw_sound(seed, speech, scenes[seed % len(scenes)], speaker)
            questions += _asked(group, sound.samples, sound.turns[:3])
    rng = Random(first)
    return questions + _asked("no sound", None, [sounds.small_talk(rng) for _ in range(40)])


def draw_front_end_questions(count: int, first: int = FIRST_SEED) -> list[Question]:
    """The same ``count`` questions about images and videos without noise and in each form of it.

    ``kind`` is yes if ``--noisy`` trains on the form, else no.
    """
    drawn = draw_questions(count // 6, first)[:-40] + draw_clip_questions(count // 6, first)
    drawn = Random(first).sample(drawn, min(count, len(drawn)))
    questions = [question._replace(group="nothing", kind="-") for question in drawn]
    questions += [question._replace(noise=Noise(), group="nothing, text first", kind="-")
                  for question in drawn]  # fmt: skip
    forms = {name: (form, "yes") for name, (form, _) in FORMS.items()}
    forms |= {name: (form, "no") for name, form in HELD_OUT_FORMS.items()}
    for name, (form, seen) in forms.items():
        rng = Random(f"{name} {first}")
        questions += [q._replace(noise=form(rng), group=name, kind=seen) for q in drawn]
    return questions


def part_of(media: Any) -> dict[str, Any]:
    """The part of a chat message that carries an image, the frames of a video, or samples."""
    if isinstance(media, Image.Image):
        return picture_part(media)
    return clip_part(media) if isinstance(media, list) else sound_part(media)


def messages_of(question: Question, part: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The chat for one question; ``part`` carries the medium (by default ``part_of`` it)."""
    parts = [] if question.media is None else [part or part_of(question.media)]
    noise = question.noise
    if noise is None:
        return [{"role": "user", "content": [*parts, {"type": "text", "text": question.text}]}]
    text = noise.before + question.text + noise.after
    system = [] if noise.system is None else [{"role": "system", "content": noise.system}]
    return [*system, {"role": "user", "content": [{"type": "text", "text": text}, *parts]}]


def answer_with_transformers(folder: Path, dtype: str) -> Answerer:
    """Greedy answers of ``Qwen2VLForConditionalGeneration``, one prompt at a time."""
    import torch
    from transformers import (
        AutoImageProcessor,
        AutoTokenizer,
        Qwen2VLForConditionalGeneration,
    )

    torch.set_num_threads(1)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    pad = model.config.image_token_id

    def answer(question: Question) -> str:
        prompt = tokenizer.apply_chat_template(
            messages_of(question, {"type": "image"}), tokenize=False, add_generation_prompt=True
        )
        extra: dict[str, Any] = {}
        if question.media is not None:
            extra = dict(processor(images=[question.media], return_tensors="pt"))
            tokens = int(extra["image_grid_thw"].prod()) // 4
            prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * tokens)
            extra["pixel_values"] = extra["pixel_values"].to(model.dtype)
        ids = torch.tensor([tokenizer.encode(prompt)])
        extra["mm_token_type_ids"] = (ids == pad).int()
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=48,
                do_sample=False, **extra,
            )  # fmt: skip
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    return lambda questions: [answer(question) for question in questions]


def answer_with_sensorium(folder: Path, dtype: str) -> Answerer:
    """Greedy answers of ``sensorium.LLM``, all prompts in one call."""
    from sensorium import LLM, SamplingParams

    llm = LLM(model=str(folder), dtype=dtype)
    params = SamplingParams(temperature=0.0, max_tokens=48)

    def answer(questions: list[Question]) -> list[str]:
        chats = [messages_of(question) for question in questions]
        return [output.outputs[0].text for output in llm.chat(chats, params)]

    return answer


def count_right(
    questions: list[Question], answers: list[str]
) -> dict[tuple[str, str], tuple[int, int]]:
    """Map (group, kind) to (right answers, questions); right answers equal the truth exactly."""
    counts: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for question, answer in zip(questions, answers, strict=True):
        right, asked = counts[question.group, question.kind]
        hit = answer.strip() == question.answer
        counts[question.group, question.kind] = (right + hit, asked + 1)
    return dict(counts)


def table_of(counts: dict[tuple[str, str], tuple[int, int]], heads: tuple[str, str] = HEADS) -> str:
    """The counts as a Markdown table, in the order in which they were asked."""
    groups = list(dict.fromkeys(group for group, _ in counts))
    lines = [f"| {heads[0]} | {heads[1]} | right | of | share |", "|---|---|---:|---:|---:|"]
    for group in groups:
        for (other, kind), (right, asked) in sorted(counts.items()):
            if other == group:
                share = 100 * right / asked
                lines.append(f"| {group} | {kind} | {right} | {asked} | {share:.1f} % |")
    return "\n".join(lines)


def put_into_card(card: Path, table: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between the marks ``begin`` and ``end`` in ``card`` by ``table``.

    Raises:
        ValueError: the card has no marks.
    """
    text = card.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{card.name} has no lines {begin} and {end} to put the figures between")
    before, after = text.split(begin)[0], text.split(end)[1]
    card.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def _questions(options: argparse.Namespace) -> list[Question]:
    count, first = options.questions, options.first_seed
    if options.speech:
        return draw_sound_questions(Speech.load(options.speech), count, first)
    if options.front_ends:
        return draw_front_end_questions(count, first)
    questions = draw_questions(count, first)
    if options.engine == "sensorium":
        questions += draw_clip_questions(count, first)
    return questions


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--engine", choices=("reference", "sensorium"), default="sensorium")
    parser.add_argument("--speech", type=Path, help="measure on sounds, with these spoken words")
    parser.add_argument(
        "--front-ends", action="store_true", help="measure with what front ends add to a question"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--questions", type=int, default=400, help="per set")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--card", type=Path, help="model card to put the table into")
    parser.add_argument("--wrong", type=Path, help="write wrong answers here, one JSON per line")
    options = parser.parse_args()
    make = answer_with_sensorium if options.engine == "sensorium" else answer_with_transformers
    questions = _questions(options)
    model = options.model or (DEMO_AUDIO if options.speech else DEMO)
    answers = make(model, options.dtype)(questions)
    counts = count_right(questions, answers)
    table = table_of(counts, ("front end", "`--noisy`") if options.front_ends else HEADS)
    right, asked = (sum(number) for number in zip(*counts.values(), strict=True))
    print(table)
    print(f"all: {right} of {asked}, {100 * right / asked:.2f} %")
    if options.card:
        marks = (BEGIN_FRONT_ENDS, END_FRONT_ENDS) if options.front_ends else (BEGIN, END)
        put_into_card(options.card, table, *marks)
    if options.wrong:
        with options.wrong.open("w", encoding="utf-8") as out:
            for question, answer in zip(questions, answers, strict=True):
                if answer.strip() != question.answer:
                    out.write(json.dumps([question.group, question.kind, question.text,
                                          question.answer, answer]) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
