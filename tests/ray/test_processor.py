"""``build_processor``: rows of a dataset through a model, bad ones among them."""

from __future__ import annotations

import asyncio
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.config import engine_config
from sensorium.errors import ENDED, ENDED_ALONE, ConfigError, EngineDeadError
from sensorium.ray import build_processor
from sensorium.ray.data import stages
from sensorium.ray.data.fronts import Prompts
from sensorium.ray.data.prompts import PromptAnswer
from sensorium.server.batches import isolation

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


class Ending(PromptAnswer):
    """A stage whose engine ends with the row ``killer``, and what runs beside it."""

    def __init__(self) -> None:
        super().__init__(engine_config(model="demo"))
        processor = SimpleNamespace(runner="generate")
        self._frontend = SimpleNamespace(input_processor=processor)  # type: ignore[assignment]
        self.running: set[str] = set()
        self.ended: dict[str, str] = {}
        self.num_deaths = 0

    async def _result(self, work: Any) -> dict[str, Any]:
        prompt = work["prompt"]
        self.running.add(prompt)
        for _ in range(10):
            await asyncio.sleep(0)
        if prompt == "killer":
            self.num_deaths += 1
            why = ENDED if len(self.running) > 1 else ENDED_ALONE
            self.ended = dict.fromkeys(self.running, why)
        self.running.discard(prompt)
        if prompt in self.ended:
            raise EngineDeadError(self.ended.pop(prompt))
        return {"generated_text": prompt}


async def test_a_row_that_ends_its_engine_has_failed_and_others_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(isolation, "FIRST_WAIT", 0.0)
    stage = Ending()
    prompts = ["a", "killer", "b", "c"]
    async with asyncio.timeout(60):
        rows = await asyncio.gather(*(stage.run({"prompt": p}, Prompts()) for p in prompts))
    assert rows[1]["error"]["code"] == "engine_ended"
    assert [rows[n]["generated_text"] for n in (0, 2, 3)] == ["a", "b", "c"]
    assert stage.num_deaths == 3


class Steps:
    """A dataset that keeps the functions of its rows."""

    context = SimpleNamespace(target_max_block_size=None)

    def __init__(self) -> None:
        self.functions: list[Any] = []

    def map(self, function: Any) -> Steps:
        self.functions.append(function)
        return self

    def map_batches(self, *_: Any, **__: Any) -> Steps:
        return self


def test_rows_have_the_same_names_when_their_task_runs_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their attempts and sizes are known by these."""
    task = ""
    context = SimpleNamespace(get_task_id=lambda: task)
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    monkeypatch.setattr(stages, "counted_attempts", lambda: None)
    steps: Any = Steps()
    build_processor("demo")(steps)

    def keys(name: str) -> list[str]:
        nonlocal task
        task = name
        rows = [steps.functions[0]({"prompt": "same"}) for _ in range(3)]
        return [stages.unpacked(row[stages.COLUMN]).key for row in rows]

    first, other, again = map(keys, ("a", "b", "a"))
    assert first == again
    assert len({*first, *other}) == 6


@pytest.mark.parametrize(
    "wrong",
    [{"concurrency": 0}, {"concurrency": (3, 2)}, {"batch_size": 0}, {"max_num_sequences": 3}],
)
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_processor("demo", **wrong)
