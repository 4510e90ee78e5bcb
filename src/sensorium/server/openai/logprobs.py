"""Log probabilities in OpenAI's two forms, with the text and bytes of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sensorium.outputs import Logprob
from sensorium.text.detokenizer import TokenSpelling

LOWEST = -9999.0
"""Log probability in place of minus infinity, which JSON does not have."""

Entry = Mapping[int, Logprob]


def chat_entry(
    spelling: TokenSpelling, token_id: int, entry: Entry, num_top: int
) -> dict[str, Any]:
    """Return an entry of ``choices[].logprobs.content``: the token and ``num_top`` others."""
    top = sorted((e.rank, i) for i, e in entry.items() if e.rank <= num_top)
    return {
        **_token(spelling, token_id, entry[token_id]),
        "top_logprobs": [_token(spelling, i, entry[i]) for _, i in top],
    }


def chat_logprobs(
    spelling: TokenSpelling, token_ids: Sequence[int], entries: Sequence[Entry], num_top: int
) -> dict[str, Any]:
    """Return ``choices[].logprobs`` of chat for some positions."""
    content = [
        chat_entry(spelling, token_id, entry, num_top)
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    spelling: TokenSpelling,
    token_ids: Sequence[int],
    entries: Sequence[Entry | None],
    num_top: int,
    offset: int = 0,
) -> dict[str, Any]:
    """Return ``choices[].logprobs`` of completions for some positions.

    ``offset``: characters of the choice before them. With ``num_top`` 0 only the sampled token is
    listed. An entry of None (the first token of a prompt) has no probability.
    """
    tokens, values, top, offsets = [], [], [], []
    for token_id, entry in zip(token_ids, entries, strict=True):
        text = spelling.text(token_id)
        tokens.append(text)
        values.append(None if entry is None else _finite(entry[token_id].logprob))
        top.append(None if entry is None else _alternatives(spelling, token_id, entry, num_top))
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": top,
        "text_offset": offsets,
    }


def prompt_logprobs(
    spelling: TokenSpelling, entries: Sequence[Entry | None] | None
) -> list[dict[str, Any] | None] | None:
    """Return ``prompt_logprobs``: for each prompt token the probabilities by token id.

    None where none were asked for.
    """
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(i): {
                "logprob": _finite(e.logprob),
                "rank": e.rank,
                "decoded_token": spelling.text(i),
            }
            for i, e in entry.items()
        }
        for entry in entries
    ]


def _alternatives(
    spelling: TokenSpelling, token_id: int, entry: Entry, num_top: int
) -> dict[str, float]:
    """Return the most likely tokens and the sampled one."""
    kept = sorted((e.rank, i) for i, e in entry.items() if e.rank <= num_top or i == token_id)
    return {spelling.text(i): _finite(entry[i].logprob) for _, i in kept}


def _token(spelling: TokenSpelling, token_id: int, entry: Logprob) -> dict[str, Any]:
    return {
        "token": spelling.text(token_id),
        "logprob": _finite(entry.logprob),
        "bytes": list(spelling.to_bytes(token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
