"""Sensorium runs and serves multimodal language models.

    from sensorium import LLM, SamplingParams

    llm = LLM(model="demo")
    out = llm.generate(
        {"prompt": "...", "multi_modal_data": {"image": picture}}, SamplingParams(max_tokens=64)
    )
    print(out[0].outputs[0].text)

The names below are the public ones; they are imported on first use, so that ``import sensorium``
itself is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sensorium.async_llm import AsyncLLM
    from sensorium.llm import LLM
    from sensorium.outputs import (
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        PoolingOutput,
        PoolingRequestOutput,
        RequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from sensorium.params import (
        LoRARequest,
        PoolingParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputs,
    )

__version__ = "0.1.0"

_HOMES = {
    "LLM": "sensorium.llm",
    "AsyncLLM": "sensorium.async_llm",
    "SamplingParams": "sensorium.params",
    "LoRARequest": "sensorium.params",
    "PoolingParams": "sensorium.params",
    "RequestOutputKind": "sensorium.params",
    "StructuredOutputs": "sensorium.params",
    "RequestOutput": "sensorium.outputs",
    "CompletionOutput": "sensorium.outputs",
    "EmbeddingOutput": "sensorium.outputs",
    "EmbeddingRequestOutput": "sensorium.outputs",
    "PoolingOutput": "sensorium.outputs",
    "PoolingRequestOutput": "sensorium.outputs",
    "ScoringOutput": "sensorium.outputs",
    "ScoringRequestOutput": "sensorium.outputs",
    "Logprob": "sensorium.outputs",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "LoRARequest",
    "Logprob",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputs",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "AsyncLLM"):
        # Before torch is imported, which reads the policy of its threads once.
        importlib.import_module("sensorium.kernels.cpu.threads").prepare()
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sensorium' has no attribute {name!r}")
