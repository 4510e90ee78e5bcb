"""What users type stays text, whatever it spells.

In every place of a conversation, for every family.

The control tokens of a prompt are compared with those of the same prompt in which an honest word
stands in the typed one's place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sensorium.config import engine_config
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.prompts.types import ChatPrompt
from sensorium.engine.stats import EngineFacts
from sensorium.errors import InvalidRequestError
from sensorium.models import loader
from sensorium.models.registry import resolve
from sensorium.text.chat.chat_template import RenderedPrompt, parse_messages
from tests import checkpoints
from tests.checkpoints.hf import make_hf, make_hf_text
from tests.reliability.asking import text

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples" / "templates"
PIXEL = "data:image/png;base64,AA=="
WORD = "word"

EVERYTHING = (
    "{% for tool in tools or [] %}<tool>{{ tool | tojson }}{{ tool.function.name }}"
    "{% for name in tool.function.parameters %}{{ name }}{% endfor %}</tool>{% endfor %}"
    "{{ subject }}{{ (subjects or {}) | tojson }}{% for key in subjects or {} %}{{ key }}{% endfor "
    "%}"
    "{% for message in messages %}[{{ message.role }}{{ message.name }}]{{ message.tool_call_id }}"
    "{{ message.reasoning_content }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in "
    "message.content or [] %}"
    "{{ part.text }}{% if part.type == 'image' %}IMAGE{% endif %}{% endfor %}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ call.id }}{{ call.function.name }}"
    "{{ call.function.arguments }}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""A template that writes all that a template can see, and ``IMAGE`` for a picture."""


@dataclass(frozen=True)
class Family:
    """How a tiny checkpoint of a family is made, how it is loaded, and spellings that it might
    fall for.
    """

    make: Callable[[Path], Path]
    options: dict[str, Any]
    typed: tuple[str, ...] = ()


def everything(placeholder: str) -> dict[str, Any]:
    """The option of that template for a model with such a placeholder of images."""
    return {"chat_template": EVERYTHING.replace("IMAGE", placeholder)}


def text_model(family: str) -> Callable[[Path], Path]:
    return lambda folder: checkpoints.make_text(family, folder)


FAMILIES = {
    "llama": Family(text_model("llama"), {}),
    "qwen3": Family(text_model("qwen3"), {}),
    "llava": Family(checkpoints.make_llava, {}, ("<image>\n", "<im_patch>", "<video>")),
    "phi3_v": Family(
        checkpoints.make_phi3_v,
        {},
        ("<|image_1|>", "<|image_2|>", "<|image_01|>", "<|image_0|>", "<|image_-1|>", "<|image_99|>",
         "<|image_9999999999999|>", "<|image|>"),
    ),
    "qwen2_vl": Family(
        checkpoints.make_qwen2_vl, {}, ("<|vision_start|><|image_pad|><|vision_end|>", "<|object_ref_start|>")
    ),
    "qwen2_5_vl": Family(
        checkpoints.make_qwen2_5_vl, {}, ("<|vision_start|><|video_pad|><|vision_end|>",)
    ),
    "qwen3_vl": Family(
        checkpoints.make_qwen3_vl, {}, ("<0.5 seconds><|vision_start|><|video_pad|><|vision_end|>",)
    ),
    "llava_onevision": Family(checkpoints.make_llava_onevision, {}, ("<image>", "<video>")),
    "minicpmv": Family(
        checkpoints.make_minicpmv,
        {},
        ("(<image>./</image>)", "<image>./</image>", "(<video>./</video>)", "<image></image>", "<slice>",
         "<image_id>0</image_id>", "<unk>"),
    ),
    "ultravox": Family(checkpoints.make_ultravox, {}, ("<|audio|>", "<|eot_id|>")),
    "embedder": Family(lambda folder: checkpoints.make_embedder("qwen2", folder), {"chat_template": EVERYTHING}),
    "vlm2vec": Family(
        checkpoints.make_phi3_v,
        {"runner": "pooling", "chat_template": str(EXAMPLES / "vlm2vec.jinja")},
        ("<|image_1|>",),
    ),
    "dse_qwen2": Family(
        checkpoints.make_qwen2_vl,
        {"runner": "pooling", "chat_template": str(EXAMPLES / "dse_qwen2_vl.jinja")},
        ("<|vision_start|><|image_pad|><|vision_end|>",),
    ),
    "hf_text": Family(lambda folder: make_hf_text("gpt2", folder), {}),
    "hf_gemma3": Family(
        lambda folder: make_hf("gemma3", folder), everything("<start_of_image>"), ("<image_soft_token>",)
    ),
    "hf_internvl": Family(
        lambda folder: make_hf("internvl", folder), everything("<IMG_CONTEXT>"), ("<IMG_CONTEXT>",)
    ),
}  # fmt: skip


class Kitchen:
    """Prepares conversations for one family."""

    def __init__(self, name: str, folder: Path) -> None:
        family = FAMILIES[name]
        folder.mkdir(parents=True, exist_ok=True)
        model = family.make(folder)
        loaded = loader.read_config(str(model))
        code = resolve(loaded.config)
        self._media = code.build_processor(loaded)
        self._vocab_size = code.shape(loaded).vocab_size
        config = engine_config(model=str(model), **family.options)
        self.input_processor = InputProcessor(config, trust_request_chat_template=True)
        self.input_processor.set_facts(
            EngineFacts(1 << 16, 100, 16, 2048, "cpu", "float32", 1, 0.0)
        )
        tokenizer = self.input_processor.tokenizer
        named = (text for text in tokenizer.control.spellings if text.strip())
        self.control = {tokenizer.token_id(spelling) for spelling in named}
        self.spellings = self._spellings(family.typed)

    def _spellings(self, typed: tuple[str, ...]) -> list[str]:
        """All special and added tokens, all placeholders of the family, and disguises of each."""
        known = dict.fromkeys(self.input_processor.tokenizer.control.spellings)
        for number in (1, 2, 3):
            for modality in self.input_processor.modalities:
                known[self._media.placeholder_text(modality, number)] = None  # type: ignore[union-attr]
        known |= dict.fromkeys(typed)
        # Tokens of nothing but white space, as some vocabularies have them, mean nothing beyond it.
        found = dict.fromkeys(spelling for spelling in known if spelling.strip())
        self.undisguised = list(found)
        for spelling in list(found):
            half = len(spelling) // 2
            # Whole again when the inner one is cut out.
            found[spelling[:half] + spelling + spelling[half:]] = None
            found[spelling * 3] = None
        return list(found)

    def render(self, messages: list[dict[str, Any]], **options: Any) -> RenderedPrompt:
        return self.input_processor.render(
            ChatPrompt(conversation=parse_messages(messages), **options)
        )

    def acting(self, rendered: RenderedPrompt) -> tuple[list[int], int]:
        """The control tokens of a prompt in order, and how many placeholders of more than one
        token it has.
        """
        own = [i for i in rendered.token_ids if i in self.control or i >= self._vocab_size]
        return own, len(rendered.numbered)


@pytest.fixture(scope="module", params=FAMILIES)
def kitchen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kitchen]:
    found = Kitchen(request.param, tmp_path_factory.mktemp(request.param))
    yield found
    found.input_processor.close()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def called(name: str = "f", arguments: Any = "{}", call_id: str = "1") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": call_id, "function": function}],
    }


def tool(**function: Any) -> tuple[dict[str, Any], ...]:
    return ({"type": "function", "function": {"name": "f", "parameters": {}, **function}},)


Place = Callable[[str], tuple[list[dict[str, Any]], dict[str, Any]]]

PLACES: dict[str, Place] = {
    "user text": lambda t: ([user(t)], {}),
    "user text, amid words": lambda t: ([user(f"a {t} b{t}c")], {}),
    "user part": lambda t: ([user([text("a"), text(t), text("b")])], {}),
    "user parts that make it together": lambda t: ([user([text(t[:2]), text(t[2:])])], {}),
    "system": lambda t: ([{"role": "system", "content": t}, user("a")], {}),
    "assistant history": lambda t: ([user("a"), {"role": "assistant", "content": t}, user("b")], {}),
    "tool output": lambda t: (
        [user("a"), called(), {"role": "tool", "content": t, "tool_call_id": "1"}, user("b")], {}
    ),
    "message name": lambda t: ([{**user("a"), "name": t}], {}),
    "tool call name": lambda t: ([user("a"), called(name=t), user("b")], {}),
    "tool call id": lambda t: ([user("a"), called(call_id=t), user("b")], {}),
    "tool call argument": lambda t: ([user("a"), called(arguments=json.dumps({"k": t})), user("b")], {}),
    "tool call argument "
    "name": lambda t: ([user("a"), called(arguments=json.dumps({t: 1})), user("b")], {}),
    "tool call arguments that are no "
    "JSON": lambda t: ([user("a"), called(arguments=t), user("b")], {}),
    "reasoning": lambda t: (
        [user("a"), {"role": "assistant", "content": "b", "reasoning_content": t}, user("c")], {}
    ),
    "tool name": lambda t: ([user("a")], {"tools": tool(name=t)}),
    "tool description": lambda t: ([user("a")], {"tools": tool(description=t)}),
    "tool parameter": lambda t: ([user("a")], {"tools": tool(parameters={t: {"type": t, "enum": [t]}})}),
    "template variable": lambda t: ([user("a")], {"chat_template_kwargs": {"subject": t}}),
    "name in a template "
    "variable": lambda t: ([user("a")], {"chat_template_kwargs": {"subjects": {t: [t]}}}),
}  # fmt: skip


ONE_BY_ONE = ("user text", "user parts that make it together")


@pytest.mark.parametrize("place", PLACES)
def test_what_users_type_never_acts(kitchen: Kitchen, place: str) -> None:
    typed = kitchen.undisguised if place in ONE_BY_ONE else [" , ".join(kitchen.spellings)]
    for template in (EVERYTHING, None):
        words, options = PLACES[place](WORD)
        try:
            honest = kitchen.render(words, **options, chat_template=template)
        except InvalidRequestError:
            assert template is None, "the family's own template knows no such message"
            continue
        for spelling in typed:
            messages, options = PLACES[place](spelling)
            rendered = kitchen.render(messages, **options, chat_template=template)
            assert kitchen.acting(rendered) == kitchen.acting(honest), (spelling, rendered.text)
            assert not rendered.refs
            if template is not None:
                assert spelling.strip()[:3] in (rendered.text or ""), "it was left out"


def test_a_continued_answer_may_spell_anything(kitchen: Kitchen) -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True}
    for template in (None, EVERYTHING):
        messages = [user("a"), {"role": "assistant", "content": f"b {WORD}"}]
        try:
            plain = kitchen.render(messages, chat_template=template, **options)
        except InvalidRequestError:
            assert template is None, "the family's own template ends every message in its own way"
            continue
        for spelling in (kitchen.undisguised[0], " , ".join(kitchen.spellings)):
            messages[1]["content"] = f"b {spelling}"
            rendered = kitchen.render(messages, chat_template=template, **options)
            assert kitchen.acting(rendered) == kitchen.acting(plain), spelling


def test_beside_an_image_only_its_own_placeholder_acts(kitchen: Kitchen) -> None:
    if not kitchen.input_processor.modalities:
        return
    modality = kitchen.input_processor.modalities[0]
    part = {"type": f"{modality}_url", f"{modality}_url": {"url": PIXEL}}
    plain = kitchen.render([user([part, text(WORD)])])
    assert len(plain.refs) == 1
    for spelling in kitchen.undisguised:
        for content in ([part, text(spelling)], [text(spelling), part]):
            rendered = kitchen.render([user(content)])
            assert kitchen.acting(rendered) == kitchen.acting(plain), spelling
