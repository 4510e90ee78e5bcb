"""vLLM's offline ``LLM`` behind ``worker.py``."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.worker import Settings, run, settings_of
from benchmarks.peers.workload import Question


class VllmEngine:
    """As its documentation shows it: compiled, prefix caching on.

    Threads and cache size come from the environment.
    """

    def __init__(self, settings: Settings) -> None:
        import vllm

        keywords: dict[str, Any] = {}
        if settings.has_vision:
            keywords["limit_mm_per_prompt"] = {"image": 1, "video": 0}
            keywords["mm_processor_kwargs"] = {"max_pixels": settings.max_pixels}
        self.name = f"vllm {vllm.__version__}"
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=str(settings.checkpoint),
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            seed=0,
            **keywords,
        )

    def complete(self, prompts: list[list[int]], num_new: int) -> list[int]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], self._greedy(num_new), use_tqdm=False
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    def answer(self, questions: list[Question], num_new: int) -> list[int]:
        outputs = self._llm.chat(
            [_conversation(question) for question in questions],
            self._greedy(num_new),
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    def _greedy(self, num_new: int) -> Any:
        return self._params(temperature=0.0, max_tokens=num_new, ignore_eos=True)


def _conversation(question: Question) -> list[dict[str, Any]]:
    picture = {"type": "image_pil", "image_pil": question.picture}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question.text}]}]


if __name__ == "__main__":
    run(settings_of(), VllmEngine)
