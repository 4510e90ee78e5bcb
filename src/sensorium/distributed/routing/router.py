"""The router: compares replicas by the predicted time to the first token of a request.

The cost of a replica, in tokens that it has to compute first::

    cost     = wait + compute
    wait     = waiting tokens + sequence * sequences + blocked * how full its KV cache is
    compute  = tokens of the prompt, less the longest cached prefix
               + embedding * embeddings of items that it has not encoded

The cheapest of a few candidates wins: replicas that were sent the prefix or the media before, and
the one that the ring names for the content (``RoutingCosts`` has the constants). The ring is the
same in all routers, so those that do not know of each other send new content to the same place. A
replica with too much to do is passed on the ring ("Consistent hashing with bounded loads",
Mirrokni et al., 2018). Requests without content go to the better of two random replicas ("The power
of two choices", Mitzenmacher, 2001).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence

from sensorium.distributed.routing.costs import RoutingCosts
from sensorium.distributed.routing.key import PREFIX_LENGTHS, RequestKey
from sensorium.distributed.routing.load import Replica, ReplicaLoad
from sensorium.distributed.routing.memory import HolderMemory
from sensorium.distributed.routing.ring import HashRing

MOST_CANDIDATES = 8
"""Holders of a request's content that are compared."""
MOST_STEPS = 8
"""Replicas on the ring that are asked for new content."""
MOST_CHOICES = 4
"""Replicas that ``Router.choose`` returns."""


class Router:
    """Sends requests where their content is, unless waiting costs more than to compute again.

    Not thread-safe. Each decision looks at a few replicas, however many there are. ``capacity`` is
    the most pairs of content and replica that are remembered, for prefixes and for media each.
    """

    def __init__(
        self,
        costs: RoutingCosts | None = None,
        *,
        capacity: int = 1 << 18,
        seed: int | None = None,
    ) -> None:
        self.costs = costs if costs is not None else RoutingCosts()
        self._prefixes = HolderMemory(capacity)
        self._media = HolderMemory(capacity)
        self._ring = HashRing()
        self._replicas: dict[str, Replica] = {}
        self._by_number: dict[int, Replica] = {}
        self._healthy: list[str] = []
        self._num_seen = 0
        self._total_wait = 0.0
        self._random = random.Random(seed)

    @property
    def num_remembered(self) -> int:
        """Return the number of pairs of content and replica that are remembered."""
        return len(self._prefixes) + len(self._media)

    def waits(self) -> dict[str, float]:
        """Return the wait at each replica, in tokens, as it is estimated now."""
        return {id: replica.wait for id, replica in self._replicas.items()}

    def set_replicas(self, ids: Sequence[str]) -> None:
        """Replace the replicas; one that was not there before has nothing cached."""
        wanted = dict.fromkeys(ids)
        for id in [id for id in self._replicas if id not in wanted]:
            self._by_number.pop(self._replicas.pop(id).number)
        for id in wanted:
            if id not in self._replicas:
                replica = Replica(id, self._num_seen)
                self._num_seen += 1
                self._replicas[id] = self._by_number[replica.number] = replica
        self._set_healthy()

    def report(self, replica: str, load: ReplicaLoad) -> None:
        """Note the load of a replica; a replica that is not known is ignored."""
        known = self._replicas.get(replica)
        if known is None:
            return
        was_healthy = known.load.healthy
        known.report(load)
        if load.healthy != was_healthy:
            self._set_healthy()
        elif load.healthy:
            self._estimate(known)

    def choose(self, key: RequestKey | None, among: Collection[str] | None = None) -> list[str]:
        """Return a few replicas, the best one first; an empty list when there are none.

        Args:
            key: Content of the request; None when it is not known.
            among: The only replicas that may be chosen; None for all. Those that are not healthy
                are chosen only when no other is left.
        """
        allowed = None if among is None or len(among) >= len(self._replicas) else set(among)
        if key is None or not (key.prefixes or key.media):
            return self._choose_by_load(allowed)
        cached = self._candidates(key, allowed)
        ranked = sorted(
            (replica.wait + self._compute(replica, key, tokens), place, replica.id)
            for place, (replica, tokens) in enumerate(cached.items())
        )
        chosen = [id for _, _, id in ranked[:MOST_CHOICES]]
        if len(chosen) < 2:
            chosen += [id for id in self._choose_by_load(allowed) if id not in chosen]
        return chosen

    def sent(self, replica: str, key: RequestKey) -> None:
        """Note that a request goes to a replica, which will have its content."""
        known = self._replicas.get(replica)
        if known is None:
            return
        known.sent(key, self._compute(known, key, self._cached(known, key)))
        self._estimate(known)
        for digest in reversed(key.prefixes):
            self._prefixes.add(digest, known.number, 0)
        for digest, _ in key.media:
            if digest:
                self._media.add(digest, known.number, 0)

    def first_token(self, replica: str, key: RequestKey) -> None:
        """Note that the prompt of a request has been computed."""
        known = self._replicas.get(replica)
        if known is not None:
            known.first_token(key)
            self._estimate(known)

    def ended(self, replica: str, key: RequestKey) -> None:
        """Note that a request has ended, or failed."""
        known = self._replicas.get(replica)
        if known is not None:
            known.ended(key)
            self._estimate(known)

    def _set_healthy(self) -> None:
        """Take up again which replicas can be chosen: all, when none of them is healthy."""
        healthy = [id for id, replica in self._replicas.items() if replica.load.healthy]
        self._healthy = healthy or list(self._replicas)
        self._ring.set(self._healthy)
        self._total_wait = sum(self._replicas[id].estimate(self.costs) for id in self._healthy)

    def _estimate(self, replica: Replica) -> None:
        before = replica.wait
        change = replica.estimate(self.costs) - before
        if replica.id in self._ring:
            self._total_wait += change

    def _can_take(self, replica: Replica, allowed: set[str] | None) -> bool:
        return replica.load.healthy and (allowed is None or replica.id in allowed)

    def _candidates(self, key: RequestKey, allowed: set[str] | None) -> dict[Replica, int]:
        """Return replicas to compare, each with the tokens of its cached prefix."""
        found: dict[Replica, int] = {}
        for length, digest in self._known_prefixes(key):
            for replica in self._some(self._prefixes.holders(digest), allowed):
                found.setdefault(replica, length)
            if len(found) >= MOST_CANDIDATES:
                break
        for digest, _ in key.media[:MOST_CANDIDATES]:
            for replica in self._some(self._media.holders(digest), allowed):
                if replica not in found:
                    found[replica] = self._cached(replica, key)
        named = self._named(key, allowed)
        if named is not None and named not in found:
            found[named] = self._cached(named, key)
        return found

    def _some(self, numbers: Iterable[int], allowed: set[str] | None) -> list[Replica]:
        """Return some of the holders with these numbers that may be chosen."""
        holders = [replica for n in numbers if (replica := self._by_number.get(n)) is not None]
        holders = [replica for replica in holders if self._can_take(replica, allowed)]
        if len(holders) > MOST_CANDIDATES:
            return self._random.sample(holders, MOST_CANDIDATES)
        return holders

    def _known_prefixes(self, key: RequestKey) -> list[tuple[int, bytes]]:
        """Return length and digest of the prefixes that some replica was sent, longest first."""
        pairs = zip(PREFIX_LENGTHS, key.prefixes, strict=False)
        return [pair for pair in pairs if self._prefixes.holders(pair[1])][::-1]

    def _named(self, key: RequestKey, allowed: set[str] | None) -> Replica | None:
        """Return the replica that the ring names, the first one that has not too much to do.

        Content is an item of media if there is one, else the first prefix that is new.
        """
        if key.media and key.media[0][0]:
            digest = key.media[0][0]
        else:
            new = (d for d in key.prefixes if not self._prefixes.holders(d))
            digest = next(new, key.prefixes[-1] if key.prefixes else b"")
        mean = self._total_wait / max(1, len(self._healthy))
        most = (1 + self.costs.spread) * mean + self.costs.slack
        best: Replica | None = None
        for id in self._ring.walk(digest, MOST_STEPS):
            replica = self._replicas[id]
            if allowed is not None and id not in allowed:
                continue
            if replica.wait <= most:
                return replica
            if best is None or replica.wait < best.wait:
                best = replica
        return best

    def _cached(self, replica: Replica, key: RequestKey) -> int:
        """Return the tokens of the longest prefix that the replica was sent."""
        for index in reversed(range(len(key.prefixes))):
            if replica.number in self._prefixes.holders(key.prefixes[index]):
                return PREFIX_LENGTHS[index]
        return 0

    def _compute(self, replica: Replica, key: RequestKey, cached: int) -> float:
        """Return the cost to compute a request at a replica that has ``cached`` tokens of it."""
        embeds = sum(
            num_embeds
            for digest, num_embeds in key.media
            if replica.number not in self._media.holders(digest)
        )
        return max(1, key.num_tokens - cached) + self.costs.embedding * embeds

    def _choose_by_load(self, allowed: set[str] | None) -> list[str]:
        """Return the better one of two random replicas, and the other."""
        ids: Sequence[str] = self._healthy
        if allowed is not None:
            ids = [id for id in ids if id in allowed] or [i for i in self._replicas if i in allowed]
        if len(ids) > 2:
            ids = self._random.sample(ids, 2)
        return sorted(ids, key=lambda id: self._replicas[id].wait)
