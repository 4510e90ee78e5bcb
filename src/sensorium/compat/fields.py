"""Request fields of vLLM (0.33, and those of 2024 and 2025 since removed) that Sensorium lacks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sensorium.compat.ollama import OLLAMA_RULES
from sensorium.compat.rule import Effect, Rule, ignored, one_of, refused, same
from sensorium.errors import InvalidRequestError, SensoriumError

_CONSTRAINT = "structured_outputs"
_MERGED = frozenset({_CONSTRAINT, "chat_template_kwargs"})
"""Fields whose members may come from several of the client's."""
_BLANKS = "whitespace_pattern"
_GUIDED = ("json", "regex", "choice", "grammar")
_MEMBERS_IGNORED = frozenset({"_backend", "_backend_was_auto", "backend", "disable_fallback"})


def _guided(member: str) -> Rule:
    return same(
        f"guided_{member}",
        f"{_CONSTRAINT}.{member}",
        lambda value: {_CONSTRAINT: {member: value}},
        "the answer follows it",
    )


SAME = [
    *map(_guided, _GUIDED),
    same(
        "guided_json_object",
        f"{_CONSTRAINT}.json_object",
        lambda value: {_CONSTRAINT: {"json_object": value}} if value else {},
        "the answer is a JSON object",
    ),
    same(
        "structural_tag",
        f"{_CONSTRAINT}.structural_tag",
        lambda value: {_CONSTRAINT: {"structural_tag": value}},
        "the answer follows it",
    ),
    same(
        "guided_whitespace_pattern",
        f"{_CONSTRAINT}.{_BLANKS}",
        lambda value: {_CONSTRAINT: {_BLANKS: value}},
        "white space between the tokens of guided JSON",
    ),
    same(
        "documents",
        "chat_template_kwargs.documents",
        lambda value: {"chat_template_kwargs": {"documents": value}},
        "a variable of the chat template",
    ),
    same(
        "use_activation",
        "normalize",
        lambda value: {"normalize": value},
        "embeddings of length 1",
    ),
]

IGNORED = [
    *ignored("all constraints use one backend", guided_decoding_backend=None),
    *ignored("chunks are sent as soon as there are tokens", stream_interval=None),
    *ignored("requests are independent; cached prefixes are found by content", session_id=None),
    *ignored("inputs are never padded", padding=None),
    *ignored("preprocessed media are not returned", mm_payload="tensors", return_mm_kwargs=None),
]  # fmt: skip

REFUSED = [
    *refused("beam search does not exist here; for several answers use n with a "
             "temperature", use_beam_search=False,
             length_penalty=1.0, early_stopping=False),
    *refused("in a chat the template writes the special tokens", add_special_tokens=False),
    *refused("only the answer is returned; prepend the last message yourself", echo=False),
    *refused("max_completion_tokens limits the whole answer, reasoning "
             "included", thinking_token_budget=None),
    *refused(
        "shorten the prompt before you send it (embeddings support truncation)",
        truncate_prompt_tokens=None,
        truncation_side=None,
    ),
    *refused("use top_logprobs for the most likely tokens", logprob_token_ids=None),
    *refused("use return_token_ids for ids beside the text", return_tokens_as_token_ids=False),
    *refused("this output does not exist "
             "here", return_weight_versions=False, routed_experts_prompt_start=0,
             return_token_offsets=False, return_prompt_text=False),
    *refused("embeddings of media are accepted, those of text are not", prompt_embeds=None),
    *refused("KV and encoder caches stay in one "
             "process", kv_transfer_params=None, ec_transfer_params=None,
             data_parallel_rank=None),
    *refused("answers are not watermarked", watermarking=False),
    *refused("use repetition_penalty or frequency_penalty against "
             "repetition", repetition_detection=None),
    *refused("plugins cannot be loaded into the engine", logits_processors=[], vllm_xargs={}),
    *refused("embeddings are numbers, or base64 of little-endian float32",
             harmless=one_of("little"), embed_dtype="float32", endianness="native"),
]  # fmt: skip

FIELD_RULES: dict[str, Rule] = {rule.name: rule for rule in (*SAME, *IGNORED, *REFUSED)}
_RULES = {**OLLAMA_RULES, **FIELD_RULES}


@dataclass(slots=True)
class AdoptedFields:
    """A body with our fields only, and the client's names of those that came from other fields."""

    body: dict[str, Any]
    client_names: dict[str, str] = field(default_factory=dict)


def adopt_fields(body: Mapping[str, Any], known: Collection[str]) -> AdoptedFields:
    """Return the body with fields of vLLM and Ollama translated into Sensorium's.

    ``known``: Sensorium's fields of such a body. Raises InvalidRequestError for fields that are not
    available.
    """
    adopted = AdoptedFields({})
    foreign: list[tuple[Rule, Any]] = []
    for name, value in body.items():
        rule = None if name in known else _RULES.get(name)
        if rule is None or not _applies(rule, known):
            adopted.body[name] = value
        else:
            foreign.append((rule, value))
    if isinstance(constraint := adopted.body.get(_CONSTRAINT), dict):
        adopted.body[_CONSTRAINT] = _members(constraint)
    for rule, value in foreign:
        for option, meant in _meaning(rule, value).items():
            if option not in _MERGED and body.get(option) is not None:
                continue  # the client's own counts, and errors are about it
            _put(adopted.body, option, meant)
            adopted.client_names[rule.to] = rule.name
            if body.get(option) is None:  # else the client sent our field, too
                adopted.client_names.setdefault(option, rule.name)
    constraint = adopted.body.get(_CONSTRAINT)
    if isinstance(constraint, dict) and set(constraint) == {_BLANKS} and foreign:
        del adopted.body[_CONSTRAINT]  # without a constraint on JSON it has no meaning
    return adopted


def _applies(rule: Rule, known: Collection[str]) -> bool:
    """Return true unless the rule sets a field that such a body does not have."""
    return not rule.to or rule.to.partition(".")[0] in known


def _meaning(rule: Rule, value: Any) -> Mapping[str, Any]:
    """Return Sensorium's fields for the value of another's. Raises InvalidRequestError."""
    if value is None or rule.effect is Effect.IGNORED:
        return {}
    if rule.convert is not None:
        return rule.convert(value)
    is_neutral = value == rule.default or value is False or value in ([], {})
    if not (is_neutral or rule.harmless(value)):
        _refuse(rule.name, rule.why)
    return {}


def _put(body: dict[str, Any], option: str, meant: Any) -> None:
    """Set a field, or a member of one that has independent ones, unless the client set it."""
    before = body.get(option)
    if option in _MERGED and isinstance(before, dict) and isinstance(meant, dict):
        body[option] = {**meant, **before}
    elif before is None:
        body[option] = meant


def _members(constraint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the members of ``structured_outputs`` that are set; None where all are null."""
    said = {n: v for n, v in constraint.items() if v is not None and n not in _MEMBERS_IGNORED}
    return said if said or not constraint else None


def _refuse(name: str, why: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is not supported: {why}.", param=name)


def rename_for_client(error: SensoriumError, client_names: Mapping[str, str]) -> None:
    """Put the names that the client used into an error about a field, in place."""
    param, message = error.param or "", error.message
    for place, name in client_names.items():  # members come before the fields that hold them
        message = message.replace(place, name)
        if param == place or param.startswith((f"{place}.", f"{place}[")):
            error.param, error.message = name, message
            return
