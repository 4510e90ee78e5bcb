"""The demo models that come with the package answer what their cards say, from encoded files."""

from __future__ import annotations

from training.clips import draw_clip
from training.evaluate import Question, messages_of
from training.sounds import draw_sound

from sensorium import LLM, SamplingParams

#: Far from all seeds of training.
FIRST = 3 * 10**15
PARAMS = SamplingParams(temperature=0, max_tokens=24)


def share_right(model: str, questions: list[Question]) -> float:
    """The share of questions that the model answers exactly."""
    with LLM(model=model, max_model_len=512) as llm:
        chats = [messages_of(question) for question in questions]
        found = [output.outputs[0].text for output in llm.chat(chats, PARAMS, use_tqdm=False)]
    pairs = zip(questions, found, strict=True)
    return sum(question.answer == text for question, text in pairs) / len(questions)


def test_demo_sees_where_things_move() -> None:
    questions = []
    for seed in range(FIRST, FIRST + 20):
        clip = draw_clip(seed, "moves", (168, 126))
        turn = next(turn for turn in clip.turns if turn.kind == "motion_where")
        questions.append(Question("", turn.kind, clip.frames, turn.question, turn.answer))
    # Four directions: guessing gives a quarter.
    assert share_right("demo", questions) >= 0.8


def test_demo_audio_counts_beeps_and_hears_tones() -> None:
    questions = []
    for seed in range(FIRST, FIRST + 20):
        scene, kind = (("beeps", "beeps"), ("tone", "describe"))[seed % 2]
        sound = draw_sound(seed, None, scene)
        turn = next(turn for turn in sound.turns if turn.kind == kind)
        questions.append(Question("", turn.kind, sound.samples, turn.question, turn.answer))
    assert share_right("demo-audio", questions) >= 0.8
