"""``transformers``' own ``generate`` behind ``worker.py``.

One batch at a time, no cache between calls.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.worker import Settings, run, settings_of
from benchmarks.peers.workload import Question


class TransformersEngine:
    """The model class that the configuration names, with its default attention."""

    def __init__(self, settings: Settings) -> None:
        import torch
        import transformers

        torch.set_num_threads(settings.num_threads)
        self._torch = torch
        self.name = f"transformers {transformers.__version__}"
        self._processor: Any = None
        kind: Any = transformers.AutoModelForCausalLM
        if settings.has_vision:
            kind = transformers.AutoModelForImageTextToText
            self._processor = transformers.AutoProcessor.from_pretrained(
                settings.checkpoint, max_pixels=settings.max_pixels
            )
            self._processor.tokenizer.padding_side = "left"
        model = kind.from_pretrained(
            settings.checkpoint, dtype=getattr(torch, settings.torch_dtype)
        )
        self._model = model.eval()

    def complete(self, prompts: list[list[int]], num_new: int) -> list[int]:
        """The prompts must have one length."""
        input_ids = self._torch.tensor(prompts)
        mask = self._torch.ones_like(input_ids)
        return self._generate({"input_ids": input_ids, "attention_mask": mask}, num_new)

    def answer(self, questions: list[Question], num_new: int) -> list[int]:
        texts = [
            self._processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": q.text}],
                    }
                ],
                add_generation_prompt=True,
            )
            for q in questions
        ]
        inputs = self._processor(
            images=[q.picture for q in questions], text=texts, padding=True, return_tensors="pt"
        )
        return self._generate(dict(inputs), num_new)

    def _generate(self, inputs: dict[str, Any], num_new: int) -> list[int]:
        with self._torch.inference_mode():
            out = self._model.generate(
                **inputs, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False
            )
        return [out.shape[1] - inputs["input_ids"].shape[1]] * out.shape[0]


if __name__ == "__main__":
    run(settings_of(), TransformersEngine)
