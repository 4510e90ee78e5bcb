"""A placeholder one past the embedding table, as Ultravox v0.6 is published.

Sounds and texts are answered.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from sensorium import LLM, SamplingParams
from sensorium.errors import RequestError
from tests.checkpoints import make_ultravox

SOUND = (np.sin(np.arange(16000) / 20).astype(np.float32), 16000)
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
SIZES = {"num_kv_blocks": 60, "block_size": 16, "max_model_len": 512}
PLACEHOLDER = "<|audio|>"


def with_token(folder: Path) -> Path:
    """Put the placeholder into the tokenizer, as its last token, one past the table of the text
    model.
    """
    text = json.loads((folder / "text" / "config.json").read_text())
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    missing = text["vocab_size"] - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<|reserved_{i}|>") for i in range(missing)])
    tokenizer.add_special_tokens([AddedToken(PLACEHOLDER, special=True, normalized=False)])
    assert tokenizer.token_to_id(PLACEHOLDER) == text["vocab_size"]
    tokenizer.save(str(path))
    config = json.loads((folder / "config.json").read_text())
    config["audio_token_index"] = text["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model, with the placeholder in no vocabulary, and one past its own."""
    plain = make_ultravox(tmp_path_factory.mktemp("plain"))
    return plain, with_token(make_ultravox(tmp_path_factory.mktemp("token")))


def answers(folder: Path) -> list[tuple[int, ...]]:
    """Greedy tokens: of a raw prompt with a sound, of a conversation with one, of a text that
    spells the token.
    """
    with LLM(str(folder), **SIZES) as llm:
        raw = {"prompt": f"{PLACEHOLDER} What?", "multi_modal_data": {"audio": SOUND}}
        [first] = llm.generate(raw, GREEDY, use_tqdm=False)
        parts = [
            {"type": "audio_url", "audio_url": {"url": DATA_URL}},
            {"type": "text", "text": f"What is {PLACEHOLDER} here?"},
        ]
        [second] = llm.chat([{"role": "user", "content": parts}], GREEDY, use_tqdm=False)
        with pytest.raises(RequestError, match="1"):
            llm.generate(f"{PLACEHOLDER} without a sound", GREEDY, use_tqdm=False)
        [third] = llm.generate("Still there?", GREEDY, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in (first, second, third)]


def wav_url() -> str:
    import base64
    import io

    import soundfile

    file = io.BytesIO()
    soundfile.write(file, SOUND[0], SOUND[1], format="WAV")
    return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()


DATA_URL = wav_url()


def test_a_placeholder_past_the_vocabulary_works(pair: tuple[Path, Path]) -> None:
    plain, token = pair
    found = answers(token)
    assert all(len(ids) == 4 for ids in found)
    assert found == answers(plain)
