"""vLLM's offline ``LLM`` behind ``worker.py``."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.peers.engines import LEVEL_VARIABLE
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
            dtype=settings.torch_dtype,
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


def hold_to_avx2() -> None:
    """Have vLLM find no AVX-512: it asks torch, whose answer no variable changes.

    It then loads its build for AVX2. Its processes import this module anew.
    """
    import torch

    for unit in ("avx512", "avx512_bf16", "avx512_vnni", "amx_tile"):
        name = f"_is_{unit}_supported"
        if hasattr(torch.cpu, name):
            setattr(torch.cpu, name, lambda: False)


def _conversation(question: Question) -> list[dict[str, Any]]:
    picture = {"type": "image_pil", "image_pil": question.picture}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question.text}]}]


if os.environ.get(LEVEL_VARIABLE) == "avx2":
    hold_to_avx2()

if __name__ == "__main__":
    run(settings_of(), VllmEngine)
