"""Keywords of vLLM's ``LLM.generate``, ``chat``, ``embed`` and ``encode`` that Sensorium lacks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from sensorium.errors import InvalidRequestError

Method = TypeVar("Method", bound=Callable[..., Any])

CALL_KEYWORDS: dict[str, str] = {
    "prompt_adapter_request": "prompt adapters are not available",
    "tokenization_kwargs": "texts are encoded with the tokenizer's own settings; pass token ids "
    "instead",
    "truncate_prompt_tokens": "shorten the prompt before you pass it",
    "guided_options_request": "use SamplingParams(structured_outputs=...)",
    "mm_processor_kwargs": "pass it in each prompt, {'prompt': ..., 'mm_processor_kwargs': ...}, "
    "or to LLM(...)",
    "prompt_token_ids": "pass prompts such as {'prompt_token_ids': [...]}",
    "chat_template_content_format": "pass it to LLM(...)",
    "concurrency_limit": "calls keep up to twice max_num_seqs prompts in flight by themselves",
}
"""By keyword: why it is not available, or what to do instead. None and neutral values pass."""


def takes_call_keywords(method: Method) -> Method:
    """Decorate a method of ``LLM`` to accept vLLM's keywords with neutral values.

    Other values raise InvalidRequestError. Keywords that are in no table raise TypeError, as usual.
    """
    foreign = CALL_KEYWORDS.keys() - inspect.signature(method).parameters.keys()

    @functools.wraps(method)
    def call(*args: Any, **keywords: Any) -> Any:
        for name in foreign & keywords.keys():
            if not _is_neutral(keywords.pop(name)):
                raise InvalidRequestError(
                    f"{name} is not supported: {CALL_KEYWORDS[name]}.", param=name
                )
        return method(*args, **keywords)

    return cast("Method", call)


def _is_neutral(value: Any) -> bool:
    return value is None or (isinstance(value, dict | list | str) and value in ({}, [], "auto"))
