"""Stand-ins for the expensive parts of the engine, in pure Python.

``FakeRunner`` carries out step plans like the real runner, with a hash in place of a model: the
token that follows a prefix is a function of the whole prefix, the items in it, the salt and the
length that rotary factors are chosen for, and of nothing else. Its KV cache holds one such prefix
hash per slot, so it notices when a block does not contain what the plan says it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from sensorium.core.plan import EncodeJob, EncodeReport, NewSequence, Span, StepPlan, StepResult
from sensorium.core.request import EngineRequest, TokenSample

NextToken = Callable[[EngineRequest, Sequence[int]], int]
"""From a request and its known tokens (prompt and generated) to the next token."""


EMBED_BYTES = 8
"""Of an embedding, as ``FakeRunner`` reports what it encodes; and an item takes a quarter of a
second."""


class PlanError(AssertionError):
    """A plan asked for something that no runner could do."""


class ManualClock:
    """A clock that only moves when told to: ``clock()`` is ``clock.now``, in seconds."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@dataclass
class _Held:
    """What the runner knows of a sequence."""

    request: EngineRequest
    token_ids: list[int]
    num_computed: int | None = None
    block_ids: list[int] = field(default_factory=list)
    prefix_hashes: list[bytes] = field(default_factory=list)
    rope_length: int = 0
    num_freed: int = 0


class FakeRunner:
    """Executes plans and checks them; raises ``PlanError`` for a plan that contradicts itself.

    ``next_token`` replaces the hash by a script of one's own. ``fail_requests`` and ``fail_items``
    (request ids, digests) may be changed between steps: they fail as a runner would report it.
    ``encoder_cache_size`` is the most embeddings that may be resident, ``encode_budget`` the most
    that one plan may encode; None does not check. ``window``: tokens before the next one
    that are read. ``most_drafts``: tokens that it tries of a span at most, whatever the plan says.
    """

    def __init__(
        self,
        *,
        block_size: int,
        num_blocks: int | None = None,
        vocab_size: int = 256,
        next_token: NextToken | None = None,
        encoder_cache_size: int | None = None,
        encode_budget: int | None = None,
        window: int | None = None,
    ) -> None:
        self.window = window
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self.next_token = next_token
        self.encoder_cache_size = encoder_cache_size
        self.encode_budget = encode_budget
        self.most_drafts: int | None = None
        self.fail_requests: set[str] = set()
        self.fail_items: set[bytes] = set()
        self.plans: list[StepPlan] = []
        self.num_encoded: Counter[bytes] = Counter()
        self.num_computed_tokens = 0
        self._held: dict[int, _Held] = {}
        self._resident: dict[bytes, int] = {}
        self._users: Counter[int] = Counter()
        self._slots: dict[int, list[bytes | None]] = {}

    @property
    def num_held(self) -> int:
        """Sequences that the runner has not been told to forget."""
        return len(self._held)

    @property
    def resident(self) -> Collection[bytes]:
        """Digests of the items whose embeddings are there."""
        return self._resident.keys()

    @property
    def num_resident_embeds(self) -> int:
        """Embeddings of the resident items."""
        return sum(self._resident.values())

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out one plan, in the order that ``StepPlan`` gives."""
        self.plans.append(plan)
        result = StepResult(plan.step_id)
        for seq_id in plan.dropped:
            self._drop(seq_id)
        for digest in plan.evict:
            _check(digest in self._resident, f"evicts {digest!r}, which is not resident")
            del self._resident[digest]
        for new in plan.new:
            self._add(new)
        self._encode(plan.encode, result)
        _check(len({s.seq_id for s in plan.spans}) == len(plan.spans), "one span per sequence")
        for span in plan.spans:
            self._append_blocks(span)
        for span in plan.spans:
            self._run(span, result)
        spans = {span.seq_id for span in plan.spans}
        _check(all(new.seq_id in spans for new in plan.new), "each new sequence has a span")
        return result

    def reset(self) -> None:
        """Forget all sequences and encoder outputs."""
        self._held.clear()
        self._resident.clear()
        self._users.clear()

    # ---- the parts of a step

    def _drop(self, seq_id: int) -> None:
        _check(seq_id in self._held, f"drops sequence {seq_id}, which is not held")
        held = self._held.pop(seq_id)
        self._users.subtract(held.block_ids[held.num_freed :])

    def _add(self, new: NewSequence) -> None:
        _check(new.seq_id not in self._held, f"adds sequence {new.seq_id} twice")
        prompt = new.request.token_ids
        _check(new.token_ids[: len(prompt)] == prompt, "known tokens begin with the prompt")
        held = _Held(new.request, list(new.token_ids))
        _extend_hashes(held)
        self._held[new.seq_id] = held

    def _encode(self, jobs: Sequence[EncodeJob], result: StepResult) -> None:
        failed = []
        for job in jobs:
            _check(job.seq_id in self._held, f"encodes for sequence {job.seq_id}, not held")
            item = self._held[job.seq_id].request.items[job.item_index]
            _check(item.digest == job.digest, "the job's item has another digest")
            _check(item.num_embeds == job.num_embeds, "the job's item has another length")
            _check(job.digest not in self._resident, f"encodes {job.digest!r} again")
            if job.digest in self.fail_items:
                failed.append(job.digest)
                continue
            self._resident[job.digest] = job.num_embeds
            self.num_encoded[job.digest] += 1
        result.failed_items = tuple(failed)
        num_made = sum(job.num_embeds for job in jobs if job.digest not in failed)
        result.encoded = EncodeReport(
            len(jobs) - len(failed), 0.25 * len(jobs), num_made * EMBED_BYTES, len(failed)
        )
        num_embeds = sum(job.num_embeds for job in jobs)
        if self.encode_budget is not None:
            _check(num_embeds <= self.encode_budget, f"encodes {num_embeds} embeddings")
        if self.encoder_cache_size is not None:
            num_resident = sum(self._resident.values())
            _check(num_resident <= self.encoder_cache_size, f"{num_resident} embeddings resident")

    def _append_blocks(self, span: Span) -> None:
        _check(span.seq_id in self._held, f"runs sequence {span.seq_id}, which is not held")
        held = self._held[span.seq_id]
        first = len(held.block_ids) if span.first_block is None else span.first_block
        _check(first == len(held.block_ids), f"appends blocks to {first} of {len(held.block_ids)}")
        held.block_ids.extend(span.new_block_ids)
        self._users.update(span.new_block_ids)
        for block_id in span.new_block_ids:
            in_range = block_id >= 0 and (self.num_blocks is None or block_id < self.num_blocks)
            _check(in_range, f"block {block_id} does not exist")

    def _run(self, planned: Span, result: StepResult) -> None:
        span = planned
        if self.most_drafts is not None and len(planned.draft_ids) > self.most_drafts:
            span = planned.with_fewer_drafts(self.most_drafts)
        held = self._held[span.seq_id]
        end = span.start + span.num_tokens
        self._check_span(span, held)
        if not self._check_items(span, held, result):
            return  # its items failed: the scheduler fails the sequence by itself
        if held.request.request_id in self.fail_requests:
            result.failed[span.seq_id] = f"request {held.request.request_id} was told to fail"
            return
        tried = _tried(held, span)
        for pos in range(span.start, end):
            block, slot = divmod(pos, self.block_size)
            block_id = held.block_ids[block]
            if self._users[block_id] != 1:
                raise PlanError(f"writes block {block_id}, which is shared")
            slots = self._slots.setdefault(block_id, [None] * self.block_size)
            slots[slot] = tried[pos]
        known = end - len(span.draft_ids)
        if held.request.params.prompt_logprobs is not None:
            result.prompt_logprobs[span.seq_id] = tuple(
                ((held.token_ids[pos], *_logprob(held.prefix_hashes[pos - 1])),)
                for pos in range(span.start + 1, min(end + 1, len(held.request.token_ids)))
            )
        if span.samples:
            samples = result.samples[span.seq_id] = self._samples(held, span.draft_ids)
            known += len(samples) - 1
            result.num_drafts[span.seq_id] = len(span.draft_ids)
        held.num_computed = known
        self._free_passed(held, known)
        self.num_computed_tokens += known - span.start
        if planned.draft_ids:
            num_blocks = -(-len(held.token_ids) // self.block_size)
            self._users.subtract(held.block_ids[num_blocks:])
            del held.block_ids[num_blocks:]
        if span.pools:
            result.embeddings[span.seq_id] = held.prefix_hashes[-1]

    def _free_passed(self, held: _Held, num_computed: int) -> None:
        """Count the blocks behind the window as given back, once they are computed."""
        if self.window is None:
            return
        end = max(held.num_freed, max(0, num_computed - self.window) // self.block_size)
        self._users.subtract(held.block_ids[held.num_freed : end])
        held.num_freed = end

    def _check_span(self, span: Span, held: _Held) -> None:
        end = span.start + span.num_tokens
        name = f"span {span.start}:{end} of sequence {span.seq_id}"
        known = len(held.token_ids) + len(span.draft_ids)
        _check(span.num_tokens > len(span.draft_ids), f"{name} has known tokens")
        _check(not span.draft_ids or end == known, f"{name} tries tokens after the last")
        _check(end <= known, f"{name}, which has {known} tokens")
        pools = held.request.pooling is not None
        wanted_flags = (end == known and not pools, end == known and pools)
        flags = (span.samples, span.pools)
        _check(flags == wanted_flags, f"{name} of {known} has samples, pools={flags}")
        if held.num_computed is not None:
            _check(span.start == held.num_computed, f"{name} follows {held.num_computed} computed")
        _check(end <= len(held.block_ids) * self.block_size, f"{name} is not covered by blocks")
        for block in range(held.num_freed, -(-span.start // self.block_size)):
            first = block * self.block_size
            wanted = held.prefix_hashes[first : min(first + self.block_size, span.start)]
            found = self._slots.get(held.block_ids[block], [])[: len(wanted)]
            _check(found == wanted, f"{name}: block {block} has other contents")

    def _check_items(self, span: Span, held: _Held, result: StepResult) -> bool:
        end = span.start + span.num_tokens
        for item in held.request.items:
            if any(start < end and start + num > span.start for start, num in item.runs):
                if item.digest in result.failed_items:
                    return False
                _check(item.digest in self._resident, f"{item.digest!r} is read, not resident")
        return True

    def _samples(self, held: _Held, draft_ids: Sequence[int]) -> tuple[TokenSample, ...]:
        samples = [self._sample(held)]
        for draft_id in draft_ids:
            if samples[-1].token_id != draft_id:
                break
            samples.append(self._sample(held))
        return tuple(samples)

    def _sample(self, held: _Held) -> TokenSample:
        prefix_hash = held.prefix_hashes[-1]
        if self.next_token is None:
            token_id = hash_token(prefix_hash, self.vocab_size)
        else:
            token_id = self.next_token(held.request, tuple(held.token_ids))
        held.token_ids.append(token_id)
        _extend_hashes(held)
        num_logprobs = held.request.params.logprobs
        if num_logprobs is None:
            return TokenSample(token_id)
        others = [(token_id + i) % self.vocab_size for i in range(1, num_logprobs + 1)]
        ranked = [(token_id, *_logprob(prefix_hash))]
        ranked += [(other, -float(rank), rank) for rank, other in enumerate(others, 2)]
        return TokenSample(token_id, tuple(ranked))


def expected_vector(request: EngineRequest) -> bytes:
    """The vector that ``request`` gets.

    Like its tokens, a function of its prompt, items and salt alone.
    """
    held = _Held(request, list(request.token_ids))
    _extend_hashes(held)
    return held.prefix_hashes[-1]


def expected_tokens(
    request: EngineRequest, *, vocab_size: int = 256, max_model_len: int | None = None
) -> list[int]:
    """The tokens that ``request`` gets when it runs alone with all the room it wants."""
    held = _Held(request, list(request.token_ids))
    _extend_hashes(held)
    params = request.params
    generated: list[int] = []
    while len(generated) < request.max_tokens:
        if max_model_len is not None and len(held.token_ids) >= max_model_len:
            break
        token_id = hash_token(held.prefix_hashes[-1], vocab_size)
        held.token_ids.append(token_id)
        generated.append(token_id)
        _extend_hashes(held)
        is_eos = token_id in request.eos_token_ids and not params.ignore_eos
        if (is_eos or token_id in params.stop_token_ids) and len(generated) >= params.min_tokens:
            break
    return generated


def expected_prompt_logprobs(
    request: EngineRequest,
) -> tuple[tuple[tuple[int, float, int], ...], ...]:
    """What ``FakeRunner`` reports for the prompt tokens after the first."""
    held = _Held(request, list(request.token_ids))
    _extend_hashes(held)
    pairs = zip(held.token_ids[1:], held.prefix_hashes, strict=False)
    return tuple(((token_id, *_logprob(before)),) for token_id, before in pairs)


def _tried(held: _Held, span: Span) -> list[bytes]:
    """The hashes of all positions, those of the tried tokens included."""
    ids = [*held.token_ids, *span.draft_ids]
    trying = _Held(held.request, ids, None, [], list(held.prefix_hashes), held.rope_length)
    _extend_hashes(trying)
    return trying.prefix_hashes


def hash_token(prefix_hash: bytes, vocab_size: int) -> int:
    """The token that follows a prefix."""
    return int.from_bytes(prefix_hash[:4], "little") % vocab_size


def _logprob(prefix_hash: bytes) -> tuple[float, int]:
    return -int.from_bytes(prefix_hash[4:6], "little") / 4096, 1 + prefix_hash[6] % 8


def _extend_hashes(held: _Held) -> None:
    """One hash per known position: over everything up to it, embeddings in place of tokens."""
    rope_length = held.request.rope_length_at(len(held.token_ids))
    if rope_length != held.rope_length:
        held.rope_length = rope_length
        held.prefix_hashes.clear()
    first = len(held.prefix_hashes)
    embeds: dict[int, tuple[bytes, int]] = {}
    for item in held.request.items if first < len(held.request.token_ids) else ():
        item_pos = 0
        for start, length in item.runs:
            embeds.update({start + i: (item.digest, item_pos + i) for i in range(length)})
            item_pos += length
    begin = b"%d salt:" % rope_length + held.request.cache_salt
    last = held.prefix_hashes[-1] if first else begin
    for pos in range(first, len(held.token_ids)):
        content = embeds.get(pos, held.token_ids[pos])
        last = blake3(last + repr(content).encode()).digest()
        held.prefix_hashes.append(last)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise PlanError(message)
