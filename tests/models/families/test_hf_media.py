"""Models that run through the code of transformers give its greedy tokens, with its own
processor beside ours.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sensorium.models import loader
from sensorium.models.families.hf import adapter
from sensorium.multimodal.items import Audio, Features
from tests.checkpoints.hf import make_hf
from tests.models.harness import Harness, Running, picture, text_ids

NUM_TOKENS = 12
TOLERANCE = 1e-4
PROMPTS = {
    "gemma3": (
        "user\nHow many birds?\nmodel\n",
        "user\n<start_of_image>What is shown?\nmodel\n",
        "user\nleft <start_of_image><start_of_image>\nright <start_of_image>\nmodel\n",
    ),
    "glm4v": (
        "user\nHow many birds?\nassistant\n",
        "user\n<|begin_of_image|><|image|><|end_of_image|>What is shown?\nassistant\n",
        "user\nleft <|image|> and <|begin_of_image|><|image|><|end_of_image|> right\nassistant\n",
    ),
    "internvl": (
        "user\nHow many birds?\nassistant\n",
        "user\n<IMG_CONTEXT>What is shown?\nassistant\n",
        "user\nleft <IMG_CONTEXT> and <IMG_CONTEXT><IMG_CONTEXT> right\nassistant\n",
    ),
    "qwen2_audio": (
        "user\nHow many birds?\nassistant\n",
        "user\n<|audio_bos|><|AUDIO|><|audio_eos|>What is heard?\nassistant\n",
        "user\nleft <|audio_bos|><|AUDIO|><|audio_eos|> and <|AUDIO|> right\nassistant\n",
    ),
    "idefics3": (
        "User: How many birds?\nAssistant:",
        "User:<image>What is shown?\nAssistant:",
        "User: left <image> and <image><image> right\nAssistant:",
    ),
}
PROMPTS["paligemma"] = (
    "<image>caption en\n",
    "<image>How many birds are there, and where?\n",
    "<image>detect a hungry cat\n",
)
PROMPTS["voxtral"] = (
    "[INST]How many birds?[/INST]",
    "[INST][BEGIN_AUDIO][AUDIO]What is heard there, and how often?[/INST]",
    "[INST][BEGIN_AUDIO][AUDIO][BEGIN_AUDIO][AUDIO]Which is louder?[/INST]",
)
PROMPTS["llava_next"] = (
    "USER: How many birds? ASSISTANT:",
    "USER: <image>What is shown? ASSISTANT:",
    "USER: <image> and <image><image> right ASSISTANT:",
)
PROMPTS["mistral3"] = tuple(text.replace("<image>", "[IMG]") for text in PROMPTS["llava_next"])
PLACEHOLDERS = {
    "llava_next": "<image>",
    "mistral3": "[IMG]",
    "gemma3": "<start_of_image>",
    "glm4v": "<|image|>",
    "idefics3": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "paligemma": "<image>",
    "qwen2_audio": "<|AUDIO|>",
    "voxtral": "[AUDIO]",
}
SIZES = ((97, 33), (40, 160), (61, 59))


class Reference:
    """The model by itself: its processor makes the inputs of a whole prompt, and ``generate``
    the tokens.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForMultimodalLM

        self.model = AutoModelForMultimodalLM.from_pretrained(folder).eval()
        self.processor = adapter.processor_of(
            str(folder), AutoConfig.from_pretrained(folder).model_type
        ).own

    def inputs(self, text: str, media: list[Any]) -> dict[str, Any]:
        from PIL import Image

        if isinstance(self.processor, SimpleNamespace):
            return self._voxtral_inputs(text, media)
        given: dict[str, Any] = {}
        if media and isinstance(media[0], Audio):
            given = {"audio": [sound.samples for sound in media], "sampling_rate": 16000}
        elif media:
            given = {"images": [Image.fromarray(image) for image in media]}
        if self.model.config.model_type == "paligemma":
            text = text.removesuffix("\n")  # its processor adds it
        return dict(self.processor(text=[text], return_tensors="pt", **given))

    def _voxtral_inputs(self, text: str, media: list[Audio]) -> dict[str, Any]:
        """As its processor and the tokenizer of its makers have it.

        375 tokens for every 30 seconds begun.
        """
        ids, features = [], []
        sounds = iter(media)
        for token in self.processor.tokenizer(text)["input_ids"]:
            ids.append(token)
            if token == self.model.config.audio_token_id:
                samples = next(sounds).samples
                num = -(-len(samples) // 480000)
                padded = np.pad(samples, (0, num * 480000 - len(samples)))
                extract = self.processor.feature_extractor
                features += [
                    extract(row, sampling_rate=16000, return_tensors="pt")["input_features"]
                    for row in padded.reshape(num, 480000)
                ]
                ids += [token] * (375 * num - 1)
        found = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        }
        return found | ({"input_features": torch.cat(features)} if features else {})

    @torch.inference_mode()
    def run(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
        """Logits (num tokens, V) and the greedy continuation."""
        logits = self.model(**inputs).logits[0].float()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        out = self.model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        return logits, out[0, inputs["input_ids"].shape[1] :].tolist()


def media_of(family: str, num: int) -> list[Any]:
    """Items of odd sizes."""
    if family in ("qwen2_audio", "voxtral"):
        rng = np.random.default_rng(num)
        return [
            Audio(rng.normal(0, 0.3, 1600 * (3 + 4 * index)).astype(np.float32), 16000)
            for index in range(num)
        ]
    return [picture(*SIZES[index], seed=num + index) for index in range(num)]


@pytest.mark.parametrize("family", sorted(PROMPTS))
def test_equal_to_the_reference(tmp_path: Path, family: str) -> None:
    folder = make_hf(family, tmp_path)
    harness = Harness(loader.load(str(folder), device="cpu"))
    reference = Reference(folder)
    expected, cases = [], []
    for text in PROMPTS[family]:
        media = media_of(family, text.count(PLACEHOLDERS[family]))
        inputs = reference.inputs(text, media)
        logits, tokens = reference.run(inputs)
        ids = text_ids(folder, text)
        seq = harness.add(ids, media)
        assert seq.ids == inputs["input_ids"][0].tolist()
        torch.testing.assert_close(harness.prefill(seq), logits, atol=TOLERANCE, rtol=TOLERANCE)
        assert greedy(harness, [harness.add(ids, media)], (11,)) == [tokens]
        cases.append((ids, media))
        expected.append(tokens)
    assert len(set(map(tuple, expected))) == len(expected), "answers must vary"
    seqs = [harness.add(ids, media) for ids, media in cases]
    assert greedy(harness, seqs, (5, 9, 13)) == expected


def test_switched_off_encoders_are_freed(tmp_path: Path) -> None:
    folder = make_hf("gemma3", tmp_path)
    whole: Any
    part: Any
    whole, part = (
        loader.load(str(folder), device="cpu", skip_modalities=skipped).model
        for skipped in ((), ("image",))
    )
    assert whole.has_encoder
    assert not part.has_encoder
    names = {name.split(".")[1] for name, _ in part.inner.named_parameters() if "." in name}
    assert names == {"language_model", "weight"}
    ids = torch.arange(5)
    assert torch.equal(part.logits(part.embed(ids)), whole.logits(whole.embed(ids)))
    with pytest.raises(ValueError, match="no encoder for image"):
        part.encode([Features("image", {}, 1)])


def greedy(harness: Harness, seqs: list[Running], chunks: tuple[int, ...]) -> list[list[int]]:
    """Greedy tokens of all in one batch whose prompts advance by different chunks."""
    found: dict[int, list[int]] = {id(seq): [] for seq in seqs}
    bidirectional = harness.loaded.family.bidirectional is not None
    while any(len(tokens) < NUM_TOKENS for tokens in found.values()):
        spans = [
            (
                seq,
                piece(seq, chunk) if bidirectional else min(chunk, len(seq.ids) - seq.num_computed),
            )
            for seq, chunk in zip(seqs, chunks, strict=True)
            if len(found[id(seq)]) < NUM_TOKENS
        ]
        order = sorted(spans, key=lambda span: span[1] > 1)
        for (seq, _), logits in zip(order, harness.step(spans), strict=True):
            if seq.num_computed == len(seq.ids):
                seq.ids.append(int(logits[-1].argmax()))
                found[id(seq)].append(seq.ids[-1])
    return [found[id(seq)] for seq in seqs]


def piece(seq: Running, chunk: int) -> int:
    """Return the size of the next chunk: at most ``chunk``, but bidirectional spans are not cut."""
    start = seq.num_computed
    end = min(start + chunk, len(seq.ids))
    if seq.positions is not None and end < seq.positions.shape[1]:
        _, first, last = seq.positions[:, end].tolist()
        if first < end:
            end = first if first > start else last + 1
    return end - start
