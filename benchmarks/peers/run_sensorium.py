"""Sensorium behind ``worker.py``."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.worker import Settings, run, settings_of
from benchmarks.peers.workload import Question


class SensoriumEngine:
    """The offline ``LLM``."""

    def __init__(self, settings: Settings) -> None:
        import sensorium

        keywords: dict[str, Any] = dict(_weights(settings))
        if settings.has_vision:
            keywords["limit_mm_per_prompt"] = {"image": 1, "video": 0}
            keywords["mm_processor_kwargs"] = {"max_pixels": settings.max_pixels}
        self.name = f"sensorium {sensorium.__version__}"
        self._llm = sensorium.LLM(
            str(settings.checkpoint),
            device="cpu",
            num_threads=settings.num_threads,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30),
            **keywords,
        )
        self._params = sensorium.SamplingParams(temperature=0.0, ignore_eos=True)

    def complete(self, prompts: list[list[int]], num_new: int) -> list[int]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            self._params.replace(max_tokens=num_new),
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    def answer(self, questions: list[Question], num_new: int) -> list[int]:
        outputs = self._llm.chat(
            [_conversation(question) for question in questions],
            self._params.replace(max_tokens=num_new),
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]


def _weights(settings: Settings) -> dict[str, str]:
    """The options that say how weights are kept; towers have int8 at the least."""
    if settings.format in ("int8", "int4"):
        options = {"dtype": "auto", "quantization": settings.format}
        return {**options, "quantization_towers": "int8"} if settings.has_vision else options
    return {"dtype": settings.torch_dtype}


def _conversation(question: Question) -> list[dict[str, Any]]:
    picture = {"type": "image_pil", "image_pil": question.picture}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question.text}]}]


if __name__ == "__main__":
    run(settings_of(), SensoriumEngine)
