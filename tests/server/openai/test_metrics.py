"""``return_metrics``: what an answer tells of its time."""

from __future__ import annotations

from sensorium.outputs import CompletionOutput, ItemMetrics, RequestMetrics, RequestOutput
from sensorium.server.openai.metrics import MOST_FRAMES, MOST_ITEMS, answer_metrics
from tests.server.harness import App


def output_of(metrics: RequestMetrics | None, num_tokens: int = 5) -> RequestOutput:
    sample = CompletionOutput(0, "text", list(range(num_tokens)), finish_reason="stop")
    return RequestOutput("id", None, [1, 2], [sample], True, metrics=metrics)


def metrics_of(**fields: object) -> RequestMetrics:
    times = {
        "prepared_time": 10.5,
        "first_scheduled_time": 10.75,
        "first_token_time": 12.0,
        "finished_time": 14.0,
        "encode_seconds": 0.25,
    }
    return RequestMetrics(10.0, **{**times, **fields})


def test_the_spans_add_up_to_the_whole() -> None:
    found = answer_metrics(output_of(metrics_of()))
    assert found is not None
    spans = ("prepare", "queue", "encode", "prefill", "decode")
    assert [found[f"{name}_seconds"] for name in spans] == [0.5, 0.25, 0.25, 1.0, 2.0]
    assert found["total_seconds"] == sum(found[f"{name}_seconds"] for name in spans) == 4.0
    assert found["time_to_first_token_seconds"] == 2.0
    assert found["tokens_per_second"] == 2.0


def test_encoding_takes_no_more_than_the_prompt() -> None:
    """A batch is shared: its seconds may be longer than what this request waited."""
    found = answer_metrics(output_of(metrics_of(encode_seconds=9.0)))
    assert found is not None
    assert (found["encode_seconds"], found["prefill_seconds"]) == (1.25, 0.0)


def test_what_is_not_known_is_null() -> None:
    assert answer_metrics(output_of(None)) is None
    found = answer_metrics(output_of(RequestMetrics(1.0), 1))
    assert found is not None
    assert found["tokens_per_second"] is None
    assert found["prefill_seconds"] is None


def test_items_and_frames_are_bounded() -> None:
    video = ItemMetrics("messages[0].content[0]", "video", 64, frames=tuple(range(1000)), fps=25.0)
    image = ItemMetrics("messages[0].content[1]", "image", 16, cached=True)
    found = answer_metrics(output_of(metrics_of(items=(video, *[image] * 1000))))
    assert found is not None
    assert len(found["items"]) == MOST_ITEMS
    first, second = found["items"][:2]
    assert len(first["frames"]) == MOST_FRAMES
    assert first["frames"] == sorted(set(first["frames"]))
    assert (first["num_frames"], first["fps"]) == (1000, 25.0)
    assert second["cached"] is True
    assert "frames" not in second


async def test_only_those_who_ask_get_them() -> None:
    app = App()
    assert "metrics" not in (await app.chat()).json()
    assert (await app.chat(return_metrics=True)).json()["metrics"] is None
    plain = (await app.chat(stream=True)).events()
    assert not any("metrics" in chunk for chunk in plain)
    asked = (await app.chat(stream=True, return_metrics=True)).events()
    assert [i for i, chunk in enumerate(asked) if "metrics" in chunk] == [len(asked) - 1]
    assert asked[-1]["choices"] == []
    both = (
        await app.chat(stream=True, return_metrics=True, stream_options={"include_usage": True})
    ).events()
    assert {"metrics", "usage"} <= set(both[-1])
    assert (await app.chat(return_metrics="yes")).error["param"] == "return_metrics"
