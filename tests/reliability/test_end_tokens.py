"""Tokens that begin, end and pad a text act, whatever the files call them.

Typed by a user they are text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from sensorium.config import engine_config
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.prompts.types import ChatPrompt, RawPrompt
from sensorium.engine.stats import EngineFacts
from sensorium.text.chat.chat_template import parse_messages
from sensorium.text.tokenizer import Tokenizer
from tests import checkpoints
from tests.checkpoints.common import new_tokenizer

END = "</s>"


def publish(folder: Path, *texts: str, **config: Any) -> Path:
    """Tokens as the Phi-3 family publishes ``</s>`` (not special, blanks to its right are its own).

    And config.json.
    """
    path = folder / "tokenizer.json"
    layout = json.loads(path.read_text())
    for token in layout["added_tokens"]:
        if token["content"] in texts:
            token |= {"special": False, "rstrip": True, "normalized": False}
    path.write_text(json.dumps(layout))
    names = folder / "tokenizer_config.json"
    values = json.loads(names.read_text())
    values.pop("added_tokens_decoder", None)
    kept = {k: v for k, v in values.items() if not (k.endswith("_token") and v in texts)}
    names.write_text(json.dumps(kept))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    whole = folder / "config.json"
    whole.write_text(json.dumps(json.loads(whole.read_text()) | config))
    return folder


def preparer_of(folder: Path) -> InputProcessor:
    found = InputProcessor(engine_config(model=str(folder)))
    found.set_facts(EngineFacts(1 << 12, 100, 16, 2048, "cpu", "float32", 1, 0.0))
    return found


@pytest.mark.parametrize("make", [checkpoints.make_phi3_v, "phi3"], ids=["phi3_v", "phi3"])
@pytest.mark.parametrize("eos", [2, 380])
def test_a_typed_end_token_of_the_phi3_family_is_text(tmp_path: Path, make: Any, eos: int) -> None:
    """Phi-3-Vision names it in config.json; Phi-3.5-mini does not, but ``<s>`` begins its texts."""
    made = checkpoints.make_text(make, tmp_path) if isinstance(make, str) else make(tmp_path)
    folder = publish(made, END, eos_token_id=eos)
    input_processor = preparer_of(folder)
    try:
        end = input_processor.tokenizer.token_id(END)
        assert end == 2
        for typed in (f"a {END} b", f"{END}", f"<s>{END}</s>"):
            messages = parse_messages([{"role": "user", "content": typed}])
            ids = input_processor.render(ChatPrompt(conversation=messages)).token_ids
            assert end not in ids, typed
        assert end in input_processor.render(RawPrompt(text=f"a {END} b")).token_ids, (
            "raw prompts are raw"
        )
    finally:
        input_processor.close()


def test_begin_and_padding_of_config_json_act_too(tmp_path: Path) -> None:
    folder = checkpoints.make_text("qwen2", tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(
        [AddedToken(text, normalized=False) for text in ("<p>", "<b>", "</b>", "<i>")]
    )
    backend.save(str(folder / "tokenizer.json"))
    begin, pad = backend.token_to_id("<b>"), backend.token_to_id("<p>")
    publish(folder, bos_token_id=begin, pad_token_id=pad)
    tokenizer = Tokenizer.from_folder(folder)
    for text, acts in {"<p>": True, "<b>": True, "</b>": True, "<i>": False}.items():
        assert (text in tokenizer.control.spellings) is acts, text
        found = tokenizer.encode(f"x{text}y", allow_special=False, add_special_tokens=False)
        assert (backend.token_to_id(text) in found) is not acts, text


def test_markup_of_other_vocabularies_stays_markup() -> None:
    """Gemma's vocabulary has ``<s>`` and ``</s>`` as tags of crossed-out text, which no special
    token begins.
    """
    backend = new_tokenizer(first=("<bos>", "<eos>"))
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("<s>", END)])
    tokenizer = Tokenizer(backend)
    assert backend.token_to_id(END) in tokenizer.encode(f"a{END}", allow_special=False)
