"""Questions about sounds, the tokenizer and the chat template of the demo model for sounds."""

from __future__ import annotations

from random import Random

from training.speech import WORDS
from training.tokenizer import Lexicon, words_in
from training.wording import small_talk_of, vary

#: What the model says of something that is not in the sound.
ABSENT = "none"

QUESTIONS: dict[str, tuple[str, ...]] = {
    "direction": (
        "Is the tone rising or falling?", "Is the tone rising, falling or steady?",
        "Does the tone rise or fall?", "Does the pitch rise or fall?", "How does the tone change?",
        "Is the pitch going up or down?", "Does the tone go up or down?",
        "How does the pitch move?",
    ),
    "is_rising": ("Is the tone rising?", "Does the tone rise?", "Does the pitch go up?"),
    "is_falling": ("Is the tone falling?", "Does the tone fall?", "Does the pitch go down?"),
    "is_steady": ("Is the tone steady?", "Does the pitch stay the same?"),
    "pitch": (
        "Is the tone high or low?", "Is it a high or a low tone?", "Is the pitch high or low?",
        "Is this tone high or low?",
    ),
    "beeps": (
        "How many beeps are there?", "How many beeps do you hear?", "How many beeps?",
        "Count the beeps.", "How often does it beep?", "What is the number of beeps?",
        "How many beeps can you hear in the sound?",
    ),
    "more_beeps": (
        "Are there more than {x} beeps?", "Do you hear more than {x} beeps?",
        "Does it beep more than {x} times?",
    ),
    "word": (
        "Which word is spoken?", "What word is spoken?", "What is said?",
        "What does the voice say?",
        "Which word do you hear?", "What did the speaker say?", "What is the word?",
        "Write down the word.", "Transcribe the sound.",
    ),
    "digit": (
        "Which digit is spoken?", "What digit is spoken?", "Which digit do you hear?",
        "What is the digit?", "Which number is spoken?", "What number do you hear?",
        "What number is said?",
    ),
    "digits": (
        "Which digits are spoken?", "What digits are spoken?", "Which digits do you hear?",
        "What are the digits?", "Write down the digits.", "Which numbers are spoken?",
    ),
    "is_word": (
        "Did the speaker say {x}?", "Is the word {x} spoken?", "Does the voice say {x}?",
        "Do you hear the word {x}?",
    ),
    "is_digit": ("Is a digit spoken?", "Is the word a number?", "Is it a digit?"),
    "source": (
        "Is it a tone, a voice or beeps?", "What kind of sound is it?",
        "What kind of sound is this?",
        "Is this a voice, beeps or a tone?",
    ),
    "is_voice": ("Is it a voice?", "Do you hear a voice?", "Is someone speaking?"),
    "describe": (
        "What do you hear?", "What is in the sound?", "Describe the sound.", "What is this sound?",
        "What's in this sound?", "What can you hear?", "What is in this clip?",
    ),
}  # fmt: skip

GREETING = "Hello! Send me a sound: tones, beeps or a spoken word."
IDENTITY = "I am a small demo model. I answer questions about simple sounds."
NO_SOUND = "I hear no sound. Please send one."
SMALL_TALK = small_talk_of(GREETING, IDENTITY)
SYSTEM = "You are a helpful assistant."
ANSWERS = (
    "rising falling steady high low yes no none nothing noise a tone beeps beep voice saying",
    " ".join(WORDS),
)
#: Further words that users may write.
_MORE = """
    system user assistant Answer in one word briefly Be brief please can could would should tell me
    about it is are was were there this that these those many much different same both together how
    what which where when who why does do did of on at to from for by not or more than less most
    least any some all sound sounds audio clip recording speaker says said spoken speech tone tones
    loud quiet long short first second third before after last next name describe list count number
    pitch frequency louder longer shorter higher lower hear heard listen music song noise silence
    man woman person color picture image video
"""
SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|audio|>",
)  # fmt: skip
AUDIO = "<|audio|>"
CHAT_TEMPLATE = (
    "<|begin_of_text|>"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if 'audio' in part['type'] %}<|audio|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def lexicon() -> Lexicon:
    """Words, special tokens and chat template of the demo model for sounds."""
    texts = [x.format(x=" ") for xs in QUESTIONS.values() for x in xs]
    texts += [text for group, _ in SMALL_TALK for text in group]
    texts += [answer for _, answer in SMALL_TALK] + [NO_SOUND, SYSTEM, *ANSWERS, _MORE]
    return Lexicon(
        words=words_in(texts),
        special=SPECIAL,
        template=CHAT_TEMPLATE,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|end_of_text|>",
    )


def ask(rng: Random, key: str, x: str = "") -> str:
    """One phrasing of the question ``key``, now and then in lower case or without its mark."""
    return vary(rng, rng.choice(QUESTIONS[key]).format(x=x))
