"""OpenVINO GenAI's continuous batching behind ``worker.py``."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.worker import Settings, run, settings_of
from benchmarks.peers.workload import Question, Workload

KV_BLOCK = 32
"""Tokens of a block of the KV cache on CPUs."""


class OpenVinoEngine:
    """A converted model, with prefix caching; types of computation are the plugin's choice.

    Without bfloat16 units float32 is asked for, as a level that is emulated is not known to the plugin everywhere.
    """

    def __init__(self, settings: Settings) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._numpy, self._openvino, self._genai = numpy, openvino, openvino_genai
        self.name = f"openvino-genai {openvino_genai.__version__}"
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = max(1, round(settings.kv_cache_gib))
        scheduler.max_num_seqs = settings.max_num_seqs
        scheduler.max_num_batched_tokens = settings.max_model_len
        scheduler.enable_prefix_caching = True
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": settings.num_threads}
        if settings.cpu == "avx2":
            properties["INFERENCE_PRECISION_HINT"] = openvino.Type.f32
        model = settings.home / "openvino" / f"{settings.checkpoint.name}-{settings.format}"
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(model), scheduler, "CPU", properties
        )
        self._workload = Workload(settings.checkpoint)
        self._takes_pictures = settings.has_vision

    def complete(self, prompts: list[list[int]], num_new: int) -> list[int]:
        """Pipelines for pictures take texts only, not ids: they get the text of the ids."""
        if self._takes_pictures:
            texts = [self._workload.decode(prompt) for prompt in prompts]
            return self._generate(texts, [[] for _ in texts], num_new, template=False)
        tensors = [
            self._openvino.Tensor(self._numpy.array([ids], dtype="int64")) for ids in prompts
        ]
        config = self._config(num_new, template=False)
        outputs = self._pipeline.generate(tensors, [config] * len(tensors))
        return [len(output.m_generation_ids[0]) for output in outputs]

    def answer(self, questions: list[Question], num_new: int) -> list[int]:
        pictures = [
            [self._openvino.Tensor(self._numpy.asarray(question.picture)[None])]
            for question in questions
        ]
        return self._generate([q.text for q in questions], pictures, num_new, template=True)

    def _generate(
        self, texts: list[str], pictures: list[list[Any]], num_new: int, *, template: bool
    ) -> list[int]:
        config = self._config(num_new, template=template)
        outputs = self._pipeline.generate(
            texts, images=pictures, generation_config=[config] * len(texts)
        )
        total = outputs[0].perf_metrics.get_num_generated_tokens()  # of all texts together
        each, rest = divmod(total, len(texts))
        return [total] if rest else [each] * len(texts)

    def _config(self, num_new: int, *, template: bool) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_new
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = template
        return config


if __name__ == "__main__":
    run(settings_of(), OpenVinoEngine)
