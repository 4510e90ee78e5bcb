"""Samples tokens from logits, batched over the sequences of a step.

Order of operations for a row: report raw log probabilities, restrict (allowed tokens, bad words,
minimum length, grammar), add biases, apply penalties, scale by temperature, filter (min-p, top-k,
top-p), sample. Sampling inverts the cumulative distribution at one uniform number that is a
function of (seed, position) alone, so a seeded request gets the same tokens in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from sensorium.core.plan import NO_TOKEN_LEFT
from sensorium.core.request import TokenSample
from sensorium.kernels import ops
from sensorium.runtime.slots import Slot
from sensorium.text.grammar.grammar import GrammarMatcher

FIRST_CANDIDATES = 256
"""Number of the most likely tokens that are sorted at first for top-p; more when they do not hold
enough mass."""
MORE_CANDIDATES = 8
"""Factor by which more are sorted then."""
SUMMED_AT_ONCE = 1024

_MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """Return a number in (0, 1) that depends on ``seed`` and ``position`` alone.

    SplitMix64 (Steele, Lea, Flood 2014) of both, its upper 53 bits.
    """
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & _MASK64
    for _ in range(2):
        z = (z + 0x9E3779B97F4A7C15) & _MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        z ^= z >> 31
    return ((z >> 11) + 0.5) / (1 << 53)


def sample(
    logits: torch.Tensor, slots: Sequence[Slot]
) -> tuple[dict[int, TokenSample], dict[int, str]]:
    """Sample one token for each row of ``logits`` (N, V) float32, which may be overwritten.

    Returns the samples and, for rows without a usable distribution, messages; both by sequence id.
    """
    wanted = {
        row: slot for row, slot in enumerate(slots) if slot.request.params.logprobs is not None
    }
    raw = _raw_logprobs(logits, list(wanted)) if wanted else None
    for row, slot in enumerate(slots):
        if _needs_processing(slot):
            _process(logits[row], slot)
    random_rows = [row for row, slot in enumerate(slots) if not slot.request.params.greedy]
    tokens = ops.argmax(logits)
    # The maximum of a row with NaN is NaN; of a row without any token left, minus infinity.
    usable = torch.isfinite(logits.amax(-1)).tolist()
    if random_rows:
        drawable = [row for row in random_rows if usable[row]]
        if drawable:
            tokens[drawable] = _draw(logits[drawable], [slots[row] for row in drawable])
    chosen = tokens.tolist()
    reports = _reports(raw, wanted, chosen) if raw is not None else {}
    samples, failed = token_samples(chosen, usable, slots)
    for row, entries in reports.items():
        seq_id = slots[row].seq_id
        if seq_id in samples:
            samples[seq_id] = TokenSample(chosen[row], entries)
    return samples, failed


def is_plain(slot: Slot) -> bool:
    """Return True if the next token is the plain argmax of the model's logits."""
    params = slot.request.params
    return params.greedy and params.logprobs is None and not _needs_processing(slot)


def token_samples(
    tokens: Sequence[int], usable: Sequence[bool], slots: Sequence[Slot]
) -> tuple[dict[int, TokenSample], dict[int, str]]:
    """Return samples of usable rows and messages for the others, by sequence id."""
    samples: dict[int, TokenSample] = {}
    failed: dict[int, str] = {}
    for token, good, slot in zip(tokens, usable, slots, strict=True):
        if good:
            samples[slot.seq_id] = TokenSample(token)
        else:
            failed[slot.seq_id] = NO_TOKEN_LEFT
    return samples, failed


def logprobs_of_targets(
    logits: torch.Tensor, targets: torch.Tensor, num_top: int
) -> list[tuple[tuple[int, float, int], ...]]:
    """Return (id, logprob, rank) of the target of each row (N, V), then of the likeliest tokens."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return _entries(logprobs, targets, [num_top] * len(targets))


def _raw_logprobs(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return torch.log_softmax(logits[rows], dim=-1)


def _reports(
    raw: torch.Tensor, wanted: dict[int, Slot], chosen: list[int]
) -> dict[int, tuple[tuple[int, float, int], ...]]:
    targets = torch.tensor([chosen[row] for row in wanted], device=raw.device)
    nums = [slot.request.params.logprobs or 0 for slot in wanted.values()]
    return dict(zip(wanted, _entries(raw, targets, nums), strict=True))


def _entries(
    logprobs: torch.Tensor, targets: torch.Tensor, nums: list[int]
) -> list[tuple[tuple[int, float, int], ...]]:
    own = logprobs.gather(1, targets[:, None])
    ranks = ((logprobs > own).sum(-1) + 1).tolist()
    tops: list[list[tuple[int, float]]] = [[] for _ in nums]
    # Each number by itself: which of equally likely tokens come first depends on how many are asked
    # for.
    for num in set(nums) - {0}:
        rows = [row for row, wanted in enumerate(nums) if wanted == num]
        values, ids = logprobs[rows].topk(min(num, logprobs.shape[-1]), dim=-1)
        for row, *top in zip(rows, ids.tolist(), values.tolist(), strict=True):
            tops[row] = list(zip(*top, strict=True))
    entries = []
    for row, (target, value) in enumerate(zip(targets.tolist(), own[:, 0].tolist(), strict=True)):
        others = [(i, v, rank) for rank, (i, v) in enumerate(tops[row], 1) if i != target]
        entries.append(((target, value, ranks[row]), *others))
    return entries


def _needs_processing(slot: Slot) -> bool:
    params, request = slot.request.params, slot.request
    return bool(
        slot.counts is not None
        or slot.grammar is not None
        or params.logit_bias
        or params.allowed_token_ids is not None
        or request.bad_words_token_ids
        or slot.num_generated < params.min_tokens
    )


def _process(row: torch.Tensor, slot: Slot) -> None:
    """Restrict, bias and penalise one row (V,) in place."""
    params, vocab = slot.request.params, row.shape[0]
    if params.allowed_token_ids is not None:
        allowed = _ids(params.allowed_token_ids, row)
        kept = row[allowed]
        row.fill_(-torch.inf)
        row[allowed] = kept
    for word in slot.request.bad_words_token_ids:
        if _tail_matches(slot, word[:-1]) and word[-1] < vocab:
            row[word[-1]] = -torch.inf
    if slot.num_generated < params.min_tokens:
        row[_ids(slot.request.eos_token_ids + params.stop_token_ids, row)] = -torch.inf
    if slot.grammar is not None:
        _restrict(row, slot.grammar, slot.request.eos_token_ids)
    if params.logit_bias:
        values = torch.tensor(list(params.logit_bias.values()), device=row.device)
        row.index_add_(0, _ids(tuple(params.logit_bias), row), values.to(row.dtype))
    if slot.counts is not None:
        _penalise(row, slot)


def _ids(ids: Sequence[int], row: torch.Tensor) -> torch.Tensor:
    return torch.tensor([i for i in ids if i < row.shape[0]], dtype=torch.int64, device=row.device)


def _tail_matches(slot: Slot, prefix: tuple[int, ...]) -> bool:
    """Return True if the generated tokens end with ``prefix``."""
    if len(prefix) > slot.num_generated:
        return False
    tail = slot.token_ids[slot.num_tokens - len(prefix) : slot.num_tokens]
    return tuple(tail.tolist()) == prefix


def _restrict(row: torch.Tensor, grammar: GrammarMatcher, ends: tuple[int, ...]) -> None:
    """Mask the tokens that the grammar does not allow next.

    A model that wants to end within JSON closes the open string or list instead of the answer: the
    probability of the tokens in ``ends`` is added to that of the closing token.
    """
    words = np.zeros(-(-row.shape[0] // 32), np.int32)
    grammar.mask(words)
    closing = grammar.closing_token(words)
    wish = row[_ids(ends, row)].logsumexp(0)
    allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: row.shape[0]]
    row.masked_fill_(torch.from_numpy(allowed == 0).to(row.device), -torch.inf)
    if closing is not None:
        barred = row[closing] == -torch.inf
        row[closing] = torch.where(barred, row[closing], torch.logaddexp(row[closing], wish))


def _penalise(row: torch.Tensor, slot: Slot) -> None:
    """Apply penalties: repetition over prompt and answer (Keskar et al.

    2019), others over the answer.
    """
    params = slot.request.params
    if params.repetition_penalty != 1.0:
        seen = torch.unique(torch.from_numpy(slot.token_ids[: slot.num_tokens])).to(row.device)
        seen = seen[seen < row.shape[0]]
        values = row[seen]
        row[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if slot.counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(slot.counts), device=row.device)
        counts = torch.tensor(list(slot.counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts


def _draw(logits: torch.Tensor, slots: list[Slot]) -> torch.Tensor:
    """Sample one token for each row of ``logits`` (R, V)."""
    params = [slot.request.params for slot in slots]
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], device=device)
    draws = [
        uniform(p.seed or 0, slot.num_generated) for p, slot in zip(params, slots, strict=True)
    ]
    point = torch.tensor(draws, dtype=torch.float64, device=device)
    # Subtracting the maximum first keeps tiny temperatures finite.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp_min(1e-5)[:, None]
    probs = torch.softmax(scaled, dim=-1)
    if any(p.min_p for p in params):
        floor = torch.tensor([p.min_p for p in params], device=device)[:, None]
        probs = torch.where(probs < floor * probs.amax(-1, keepdim=True), 0.0, probs)
    plain = [i for i, p in enumerate(params) if p.top_p >= 1.0 and p.top_k <= 0]
    sorted_rows = [i for i in range(len(params)) if i not in set(plain)]
    tokens = torch.empty(len(params), dtype=torch.int64, device=device)
    if plain:
        tokens[plain] = _invert(probs[plain], point[plain])
    if sorted_rows:
        tokens[sorted_rows] = _draw_filtered(
            probs[sorted_rows],
            point[sorted_rows],
            torch.tensor(
                [params[i].top_k if params[i].top_k > 0 else probs.shape[1] for i in sorted_rows],
                device=device,
            ),
            torch.tensor([params[i].top_p for i in sorted_rows], device=device),
        )
    return tokens


def _draw_filtered(
    probs: torch.Tensor, point: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Sample from the fewest of the ``top_k`` likeliest tokens that reach ``top_p``.

    All tensors have R rows. Only as many candidates are sorted as the filters can keep. Their
    number depends on the row alone, and rows with the same number go together, since equally likely
    tokens come in another order among more candidates.
    """
    vocab = probs.shape[1]
    mass, tokens = _sums(probs), torch.empty_like(top_k)
    waiting: dict[int, list[int]] = {}
    for row, limit in enumerate(top_k.tolist()):
        size = FIRST_CANDIDATES
        while size < min(limit, vocab) < vocab:
            size *= MORE_CANDIDATES
        waiting.setdefault(min(vocab, size), []).append(row)
    while waiting:
        size, rows = waiting.popitem()
        drawn, enough = _draw_candidate(
            probs[rows], point[rows], top_k[rows], top_p[rows], mass[rows], size
        )
        tokens[rows] = drawn
        short = [row for row, done in zip(rows, enough.tolist(), strict=True) if not done]
        if short and size < vocab:
            waiting.setdefault(min(vocab, size * MORE_CANDIDATES), []).extend(short)
    return tokens


def _draw_candidate(
    probs: torch.Tensor,
    point: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    mass: torch.Tensor,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample as ``_draw_filtered`` from the ``size`` likeliest tokens.

    ``mass`` is the sum of each row. Also returns whether these are all that the filters keep.
    """
    values, ids = probs.topk(size, dim=-1)
    rank = torch.arange(size, device=probs.device)
    values = torch.where(rank[None] < top_k[:, None], values, 0.0)
    reached = values.cumsum(-1)
    # What top-k keeps is the whole of which top-p is a part.
    limit = top_p * torch.where(top_k <= size, reached[:, -1], mass)
    kept = torch.where((reached - values < limit[:, None]) | (rank[None] == 0), values, 0.0)
    enough = (top_k <= size) | (reached[:, -1] >= limit)
    return ids.gather(1, _invert(kept, point)[:, None])[:, 0], enough


def _sums(rows: torch.Tensor) -> torch.Tensor:
    """Return the sums (R,) of rows (R, N), each with the same bits in any batch.

    torch would split the sum of a single long row over threads, and no others.
    """
    padded = F.pad(rows, (0, -rows.shape[1] % SUMMED_AT_ONCE))
    return padded.view(len(rows), -1, SUMMED_AT_ONCE).sum(-1).cumsum(-1)[:, -1]


def _invert(weights: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """Return the index at which cumulative weights (R, V) pass ``point`` (R,) of their sum."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    target = point[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding may put the target at the very sum: take the last token that has weight.
    last = weights.shape[1] - 1 - (weights.flip(-1) > 0).to(torch.uint8).argmax(-1)
    return torch.minimum(index, last)
