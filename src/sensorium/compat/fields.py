"""Fields of vLLM's requests that are not ours: of version 0.33, and those of 2024 and 2025 that are gone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sensorium.compat.rule import Effect, Rule, nothing, one_of, refused, same
from sensorium.errors import InvalidRequestError, SensoriumError

_CONSTRAINT = "structured_outputs"
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
        "guided_whitespace_pattern",
        f"{_CONSTRAINT}.{_BLANKS}",
        lambda value: {_CONSTRAINT: {_BLANKS: value}},
        "what may stand at the gaps of guided JSON",
    ),
    same(
        "documents",
        "chat_template_kwargs.documents",
        lambda value: {"chat_template_kwargs": {"documents": value}},
        "the chat template sees them",
    ),
    same(
        "use_activation",
        "normalize",
        lambda value: {"normalize": value},
        "embeddings of length 1",
    ),
]

NOTHING = [
    *nothing("one library compiles all constraints", guided_decoding_backend=None),
    *nothing("reasoning stays in the content, as the model writes it", include_reasoning=True),
    *nothing("chunks are sent as tokens come", stream_interval=None),
    *nothing("each request is on its own; prefixes are found again by their content", session_id=None),
    *nothing("inputs are not padded", padding=None),
    *nothing("nothing is shown of features", mm_payload="tensors", return_mm_kwargs=None),
]  # fmt: skip

REFUSED = [
    *refused("beam search is not available; n with a temperature gives several answers", use_beam_search=False,
             length_penalty=1.0, early_stopping=False),
    *refused("the chat template writes the special tokens of a chat", add_special_tokens=False),
    *refused("the answer alone is sent; join it to the last message", echo=False),
    *refused("the answer's length is bounded as a whole, by max_completion_tokens", thinking_token_budget=None),
    *refused(
        "shorten the prompt before it is sent (inputs of embeddings take it)",
        truncate_prompt_tokens=None,
        truncation_side=None,
    ),
    *refused("top_logprobs reports the most likely tokens", logprob_token_ids=None),
    *refused("return_token_ids gives ids beside the texts", return_tokens_as_token_ids=False),
    *refused("there is no such output", return_weight_versions=False, routed_experts_prompt_start=0,
             return_token_offsets=False, return_prompt_text=False),
    *refused("embeddings of media are taken, those of text are not", prompt_embeds=None),
    *refused("KV and encoder caches stay in one process", kv_transfer_params=None, ec_transfer_params=None,
             data_parallel_rank=None),
    *refused("answers are not marked", watermarking=False),
    *refused("repetition_penalty and frequency_penalty act against repetition", repetition_detection=None),
    *refused("code of others is not loaded into the engine", logits_processors=[], vllm_xargs={}),
    *refused("use guided_json, guided_regex, guided_choice or guided_grammar", structural_tag=None),
    *refused("embeddings are float32 numbers of this machine's byte order, or base64 of them",
             harmless=one_of("little"), embed_dtype="float32", endianness="native"),
]  # fmt: skip

FIELD_RULES: dict[str, Rule] = {rule.name: rule for rule in (*SAME, *NOTHING, *REFUSED)}


@dataclass(slots=True)
class AdoptedFields:
    """A body with our fields only, and the client's names of those that came from other fields."""

    body: dict[str, Any]
    client_names: dict[str, str] = field(default_factory=dict)


def adopt_fields(body: Mapping[str, Any], known: Collection[str]) -> AdoptedFields:
    """Return the body without vLLM's fields, and with what these mean.

    known: the fields that are ours in such a body. Raises InvalidRequestError for what is not supported.
    """
    adopted = AdoptedFields({})
    foreign: list[tuple[Rule, Any]] = []
    for name, value in body.items():
        rule = None if name in known else FIELD_RULES.get(name)
        if rule is None or not _applies(rule, known):
            adopted.body[name] = value
        else:
            foreign.append((rule, value))
    if isinstance(constraint := adopted.body.get(_CONSTRAINT), dict):
        adopted.body[_CONSTRAINT] = _members(constraint)
    for rule, value in foreign:
        for option, meant in _meaning(rule, value).items():
            _put(adopted.body, option, meant)
            adopted.client_names[rule.to] = rule.name
            if body.get(option) is None:  # else the client says it in our words, too
                adopted.client_names.setdefault(option, rule.name)
    constraint = adopted.body.get(_CONSTRAINT)
    if isinstance(constraint, dict) and set(constraint) == {_BLANKS} and foreign:
        del adopted.body[_CONSTRAINT]  # there is no JSON whose gaps it could mean
    return adopted


def _applies(rule: Rule, known: Collection[str]) -> bool:
    """Return true unless the rule means a field that such a body does not have."""
    return not rule.to or rule.to.partition(".")[0] in known


def _meaning(rule: Rule, value: Any) -> Mapping[str, Any]:
    """Return our fields for the value of one of vLLM's. Raises InvalidRequestError."""
    if value is None or rule.effect is Effect.NOTHING:
        return {}
    if rule.convert is not None:
        return rule.convert(value)
    is_neutral = value == rule.default or value is False or value in ([], {})
    if not (is_neutral or rule.harmless(value)):
        _refuse(rule.name, rule.why)
    return {}


def _put(body: dict[str, Any], option: str, meant: Any) -> None:
    """Set a field, or a member of one; what the client says in our words wins."""
    before = body.get(option)
    if isinstance(before, dict) and isinstance(meant, dict):
        body[option] = {**meant, **before}
    elif before is None:
        body[option] = meant


def _members(constraint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the members of ``structured_outputs`` that say something; None where all are null."""
    if constraint.get("structural_tag") is not None:
        _refuse(f"{_CONSTRAINT}.structural_tag", FIELD_RULES["structural_tag"].why)
    said = {n: v for n, v in constraint.items() if v is not None and n not in _MEMBERS_IGNORED}
    return said if said or not constraint else None


def _refuse(name: str, why: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is not supported here: {why}.", param=name)


def rename_for_client(error: SensoriumError, client_names: Mapping[str, str]) -> None:
    """Put the names that the client used into an error about a field, in place."""
    param, message = error.param or "", error.message
    for place, name in client_names.items():  # members come before the fields that hold them
        message = message.replace(place, name)
        if param == place or param.startswith((f"{place}.", f"{place}[")):
            error.param, error.message = name, message
            return
