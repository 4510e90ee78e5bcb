"""``build_processor``: rows of a dataset through a model, bad ones among them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.errors import ConfigError
from sensorium.ray import build_processor

GREEDY = {"temperature": 0.0, "max_tokens": 6}


def png(number: int) -> bytes:
    pixels = np.full((24, 24, 3), (number * 37 % 256, 90, 200), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def conversation(url: str) -> list[dict[str, Any]]:
    text = {"type": "text", "text": "What is this?"}
    return [{"role": "user", "content": [text, {"type": "image_url", "image_url": {"url": url}}]}]


def test_texts_conversations_and_bad_rows(ray_address: str) -> None:
    import base64

    import ray

    urls = [f"data:image/png;base64,{base64.b64encode(png(i)).decode()}" for i in range(4)]
    rows: list[dict[str, Any]] = [
        *({"id": i, "kind": "chat", "text": url} for i, url in enumerate(urls)),
        {"id": 4, "kind": "chat", "text": "data:image/png;base64,bm8gaW1hZ2U="},
        {"id": 5, "kind": "chat", "text": "http://127.0.0.1:1/x.png"},
        {"id": 6, "kind": "text", "text": "Once upon"},
        {"id": 7, "kind": "text", "text": "word " * 100_000},
        {"id": 8, "kind": "wrong", "text": ""},
    ]

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        if row["kind"] == "chat":
            return {"messages": conversation(row["text"]), "sampling_params": GREEDY}
        if row["kind"] == "text":
            return {"prompt": row["text"], "sampling_params": GREEDY}
        return {"promt": row["text"]}

    def postprocess(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "text": None, "seen": row["kind"]}

    processor = build_processor(
        "demo", preprocess=preprocess, postprocess=postprocess, max_num_seqs=8, num_threads=1
    )
    found = {row["id"]: row for row in processor(ray.data.from_items(rows)).take_all()}
    assert set(found) == set(range(9))
    with LLM("demo", max_num_seqs=8) as llm:
        params = SamplingParams(**GREEDY)
        expected = [llm.chat(conversation(url), params)[0] for url in urls]
        expected.append(llm.generate("Once upon", params)[0])
    for number, output in zip((0, 1, 2, 3, 6), expected, strict=True):
        row, [sample] = found[number], output.outputs
        assert row["error"] is None
        assert row["generated_text"] == sample.text
        assert list(row["generated_tokens"]) == sample.token_ids
        assert row["num_input_tokens"] == len(output.prompt_token_ids)
        assert row["num_generated_tokens"] == len(sample.token_ids)
        assert row["seen"] in ("chat", "text")
    codes = {number: found[number]["error"]["code"] for number in (4, 5, 7, 8)}
    assert codes == {
        4: "media_undecodable",
        5: "media_refused",
        7: "context_length_exceeded",
        8: "invalid_request",
    }
    assert found[4]["error"]["param"].startswith("messages[0].content[1]")
    assert "prompt" in found[8]["error"]["message"]
    assert found[4]["generated_text"] is None


@pytest.mark.parametrize(
    "wrong",
    [{"concurrency": 0}, {"concurrency": (3, 2)}, {"batch_size": 0}, {"max_num_sequences": 3}],
)
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_processor("demo", **wrong)
