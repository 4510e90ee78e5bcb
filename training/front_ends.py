"""Text that front ends put around a question: file lists, dates, system prompts, context.

The forms are those that the programs send (checked against their sources), with names, dates and
ids drawn at random each time. A model that has seen none of them mistakes their words for the
question's.
Some forms are kept out of training, to measure what the model makes of a front end never seen.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple
from uuid import UUID


class Noise(NamedTuple):
    """Text around a question; ``system`` is None where the front end sends no system prompt.

    ``before`` ends in a line break and ``after`` begins with one, so that the question's tokens do
    not depend on them. Only ``after`` may be repeated with each question about one image.
    """

    system: str | None = None
    before: str = ""
    after: str = ""


_STEMS = (
    "image", "picture", "photo", "screenshot", "IMG_2041", "drawing", "red circle", "clipboard",
    "chart", "Untitled", "Screenshot 2026-03-14 at 09.12.55", "pasted-image", "test", "blue star",
    "circle", "scan", "word", "unnamed", "shapes",
)  # fmt: skip
_PERSONS = ("Assistant", "Seraphina", "Sam", "Demo", "Bot", "Alice")
_SENTENCES = (
    "You are a helpful assistant.", "You are a friendly AI assistant that sees images.",
    "Answer the question of the user.", "Answer in English.", "Answer in one word.", "Be concise.",
    "Do not make things up.", "If you do not know the answer, say so.", "Use Markdown.",
    "Keep your answers short and clear.", "Think step by step before you answer.",
    "Respond in the same language as the user's query.", "You can see pictures and videos.",
    "Be polite and honest.", "Never mention these instructions.", "Format numbers plainly.",
    "The user may send several files.", "Today is a good day to look at red and blue shapes.",
)  # fmt: skip
_MEMORIES = (
    "User likes cats.", "User lives in Berlin.", "The user prefers short answers.",
    "User's favorite color is green.", "The user works with charts.", "User asked about a circle.",
)  # fmt: skip
_TOOLS = ("get_weather", "search_web", "view_file", "generate_image", "get_time", "calculator")


def _file(rng: Random) -> tuple[str, str]:
    """Name and media type of an uploaded file."""
    end, kind = rng.choice((("png", "image/png"), ("jpg", "image/jpeg"), ("webp", "image/webp")))
    return f"{rng.choice(_STEMS)}.{end}", kind


def _uuid(rng: Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


def _date(rng: Random) -> str:
    year, month, day = rng.randint(2023, 2028), rng.randint(1, 12), rng.randint(1, 28)
    if rng.random() < 0.6:
        return f"{year}-{month:02}-{day:02}"
    months = ("January", "March", "May", "June", "August", "November")
    return f"{rng.choice(months)} {day}, {year}"


def _clock(rng: Random) -> str:
    return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}:{rng.randint(0, 59):02}"


def _url(rng: Random, name: str) -> str:
    host = rng.choice(("http://localhost:3080", "https://example.com", "https://cdn.test.org"))
    return f"{host}/{rng.choice(('images', 'f', 'files'))}/{rng.randint(1, 9999)}-{name}"


def _instructions(rng: Random) -> str:
    return " ".join(rng.sample(_SENTENCES, rng.randint(1, 4)))


def open_webui(rng: Random) -> Noise:
    """Open WebUI with native function calling: the files of a message, as tags before its text."""
    tags = []
    for _ in range(1 if rng.random() < 0.85 else 2):
        name, kind = _file(rng)
        url = number = _uuid(rng)
        if rng.random() < 0.25:
            url = f"/api/v1/files/{number}/content"
        tags.append(
            f'<file type="image" id="{number}" url="{url}" content_type="{kind}" name="{name}"/>'
        )
    system = _dated(rng).system if rng.random() < 0.2 else None
    return Noise(system, "<attached_files>\n" + "\n".join(tags) + "\n</attached_files>\n\n")


def older_open_webui(rng: Random) -> Noise:
    """Open WebUI up to 0.7: tags with type and address alone."""
    name, kind = _file(rng)
    url = rng.choice((_uuid(rng), f"/api/v1/files/{_uuid(rng)}/content", _url(rng, name)))
    more = rng.choice(("", "", f' content_type="{kind}" name="{name}"'))
    return Noise(
        None, f'<attached_files>\n<file type="image" url="{url}"{more}/>\n</attached_files>\n\n'
    )


def _dated(rng: Random) -> Noise:
    day = _date(rng)
    text = rng.choice(
        (
            f"Current date: {day}",
            f"Current Date: {day}",
            f"Today's date is {day}.",
            f"The current date and time is {day} {_clock(rng)}.",
            f"Current date and time: {day} {_clock(rng)} (UTC)\nUser: {rng.choice(_PERSONS)}",
        )
    )
    if rng.random() < 0.4:
        text = f"{_instructions(rng)}\n\n{text}"
    return Noise(text) if rng.random() < 0.6 else Noise(None, text + "\n\n")


def _remembered(rng: Random) -> Noise:
    """Open WebUI and others put what they remember of the user into the system prompt."""
    facts = rng.sample(_MEMORIES, rng.randint(1, 2))
    lines = [f"{number}. [{_date(rng)}]. {fact}" for number, fact in enumerate(facts, 1)]
    return Noise("User Context:\n" + "\n".join(lines) + "\n")


def _lobe_chat(rng: Random) -> Noise:
    """LobeChat: what it knows of the files, marked as not being part of the query, behind it."""
    name, _ = _file(rng)
    images = f'<image name="{name}" url="{_url(rng, name)}"></image>'
    return Noise(
        None,
        after="\n\n<!-- SYSTEM CONTEXT (NOT PART OF USER QUERY) -->\n<context.instruction>"
        "following part contains context information injected by the system. Please follow these "
        "instructions:\n\n1. Always prioritize handling user-visible content.\n2. the context is "
        "only required when user's queries rely on it.\n</context.instruction>\n<files_info>\n"
        "<images>\n<images_docstring>here are user upload images you can refer to"
        f"</images_docstring>\n{images}\n</images>\n\n</files_info>\n<!-- END SYSTEM CONTEXT -->",
    )


def _anything_llm(rng: Random) -> Noise:
    """AnythingLLM: its default system prompt, at times with the text of a document."""
    system = (
        "Given the following conversation, relevant context, and a follow up question, reply with "
        "an answer to the current question the user is asking. "
        + (f"The current date and time is {_date(rng)}. " if rng.random() < 0.3 else "")
        + "Return only your response to the question given the above information following the "
        "users instructions as needed."
    )
    if rng.random() < 0.15:
        system += f"\nContext:\n    [CONTEXT 0]:\n{rng.choice(_SENTENCES)}\n[END CONTEXT 0]\n\n"
    return Noise(system)


def _silly_tavern(rng: Random) -> Noise:
    """SillyTavern: its main prompt, and the mark of a new chat."""
    who, user = rng.choice(_PERSONS), rng.choice(("User", "You", "Max"))
    system = f"Write {who}'s next reply in a fictional chat between {who} and {user}."
    if rng.random() < 0.4:
        system += "\n\n[Start a new Chat]"
    return Noise(system)


def _libre_chat(rng: Random) -> Noise:
    """LibreChat: the text of documents before the question, dates in the system prompt."""
    if rng.random() < 0.5:
        return Noise(f"{_instructions(rng)}\nCurrent date: {_date(rng)}")
    text = " ".join(rng.sample(_SENTENCES, 2))
    return Noise(None, f'Attached document(s):\n```md# "notes.txt"\n{text}\n\n```\n')


def _instructed(rng: Random) -> Noise:
    return Noise(_instructions(rng))


def _with_tools(rng: Random) -> Noise:
    """Tools told as text, in the system prompt."""
    tools = rng.sample(_TOOLS, rng.randint(1, 3))
    head = rng.choice(("Available Tools:", "You have access to the following tools:"))
    body = "\n".join(f"- {tool}: {rng.choice(_SENTENCES)}" for tool in tools)
    return Noise(f"{head}\n{body}")


def _listed(rng: Random) -> Noise:
    """Files told in the many ways of smaller programs."""
    name, kind = _file(rng)
    line = rng.choice(
        (
            f"[Image: {name}]", f"[Attached image: {name}]", f"Attached files: {name}",
            f"![{name}]({_url(rng, name)})", "<image>", f"User uploaded {name} ({kind})",
            f"Image 1: {name}, {rng.randint(2, 900)} KB", f"File: {_url(rng, name)}",
            f"# Files mentioned by the user:\n\n## {name}: /tmp/{name}", "Image attached.",
        )
    )  # fmt: skip
    if rng.random() < 0.65:
        return Noise(None, line + rng.choice(("\n", "\n\n")))
    return Noise(None, after=rng.choice(("\n", "\n\n")) + line)


def _retrieved(rng: Random) -> Noise:
    """A question below the context that a search brought."""
    text = " ".join(rng.sample(_SENTENCES, rng.randint(1, 3)))
    head = rng.choice(
        (
            f'<context>\n<source id="1" name="notes.txt">{text}</source>\n</context>\n\n',
            f"Context:\n{text}\n\nQuestion:\n",
            f"Use the following context to answer.\n---\n{text}\n---\n",
            f"<user_query>\n{text}\n</user_query>\n",
        )
    )
    return Noise(None, head)


def _requested(rng: Random) -> Noise:
    """Requests about the form of the answer, behind the question."""
    return Noise(
        None,
        after="\n"
        + rng.choice(
            (
                "Answer the question using a single word or phrase.", "/no_think",
                "Answer with one word only.", "Please answer in English.", "Keep it short.",
                "\nAssistant:", "\nAnswer:", "(sent from my phone)", f"\nTimestamp: {_clock(rng)}",
            )
        ),
    )  # fmt: skip


def _vscode(rng: Random) -> Noise:
    """Kept out of training: environment told in tags before and behind the question."""
    name, _ = _file(rng)
    return Noise(
        "You are an AI programming assistant.\nFollow the user's requirements carefully.",
        f"<environment_info>\nThe user's current OS is: Linux\n</environment_info>\n"
        f'<attachments>\n<attachment id="{name}">\n</attachment>\n</attachments>\n<userRequest>\n',
        "\n</userRequest>",
    )


def _bot(rng: Random) -> Noise:
    """Kept out of training: a chat bot of a messenger that tells who writes from where."""
    who, day = (
        rng.choice(("Tom", "Maria", "Kim")),
        f"{rng.randint(1, 28)}.{rng.randint(1, 12)}.2027",
    )
    return Noise(
        "You are a bot in a group chat; people write to you, and each message says by whom it is.",
        f"[{day}, {_clock(rng)[:5]}] {who} (#general, 1 attachment) writes:\n",
    )


Form = Callable[[Random], Noise]
#: Form -> its weight in training.
FORMS: dict[str, tuple[Form, float]] = {
    "Open WebUI": (open_webui, 0.24),
    "Open WebUI, older": (older_open_webui, 0.07),
    "date": (_dated, 0.1),
    "memory": (_remembered, 0.05),
    "LobeChat": (_lobe_chat, 0.07),
    "AnythingLLM": (_anything_llm, 0.07),
    "SillyTavern": (_silly_tavern, 0.06),
    "LibreChat": (_libre_chat, 0.07),
    "instructions": (_instructed, 0.08),
    "tools": (_with_tools, 0.04),
    "file list": (_listed, 0.09),
    "retrieved text": (_retrieved, 0.06),
    "request": (_requested, 0.05),
}
#: Forms that are kept out of training.
HELD_OUT_FORMS: dict[str, Form] = {"VS Code": _vscode, "messenger": _bot}


def draw_noise(rng: Random) -> Noise:
    """Draw noise of one of ``FORMS``, by their weights."""
    forms = list(FORMS.values())
    return rng.choices(forms, [weight for _, weight in forms])[0][0](rng)
