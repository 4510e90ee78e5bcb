"""The router: compares replicas by the predicted time to the first token of a request.

The cost of a replica, in tokens that it has to compute first::

    cost     = wait + compute
    wait     = waiting tokens + sequence * sequences + blocked * how full its KV cache is
               + excess * requests that it got lately beyond its share
    compute  = tokens of the prompt, less those of the cached prefix
               + embedding * embeddings of items that it has not encoded

The cheapest of a few candidates wins: replicas that were sent the prefix or the media before, and
the one that the ring names for the content (``RoutingCosts`` has the constants).

Cached content is what this router has sent there, times the probability that it is still there: a
prefix in a cache with room for ``free`` tokens that has computed ``age`` since is there with
probability ``min(1, free / age)``.

The ring is the same in all routers, so those that do not know of each other send content to the
same place. The place of a prompt is that of its first item of media, or of the longest prefix that
several conversations have (such as a system prompt); popular content has as many places as its
share of the requests needs, and what follows the prefix decides which of them. So a conversation
has one place, whichever router gets its next turn. The replica there counts as having the part
``prior * (1 - 1 / routers)`` of what this router does not know: the others may have sent it there.
One with too much to do is passed on the ring ("Consistent hashing with bounded loads", Mirrokni et
al., 2018). Requests without content go to the better of two random replicas ("The power of two
choices", Mitzenmacher, 2001).
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

from blake3 import blake3

from sensorium.distributed.routing.costs import RoutingCosts
from sensorium.distributed.routing.key import PREFIX_LENGTHS, RequestKey
from sensorium.distributed.routing.load import Replica, ReplicaLoad
from sensorium.distributed.routing.memory import HolderMemory, Popularity
from sensorium.distributed.routing.ring import HashRing

MOST_CANDIDATES = 8
"""Holders of one piece of a request's content that are compared."""
MOST_COMPARED = 16
"""Holders of all of its content after which no further piece is looked at."""
MOST_STEPS = 8
"""Replicas on the ring that are asked for new content."""
LATEST = 128
"""Most requests of a replica that count for the balance, before the older ones count half."""
MOST_CHOICES = 4
"""Replicas that ``Router.choose`` returns."""


class _Place(NamedTuple):
    """Replica that the ring names, and the share of the content that it should have.

    ``shared``: tokens of the prefix that all who come to this place have.
    """

    replica: Replica
    prior: float
    shared: int


class Router:
    """Sends requests where their content is, unless waiting costs more than to compute again.

    Not thread-safe. Each decision looks at a few replicas, however many there are. ``capacity`` is
    the most pairs of content and replica that are remembered, for prefixes and for media each.
    ``num_routers``: routers of the same replicas, each with a part of the requests.
    """

    def __init__(
        self,
        costs: RoutingCosts | None = None,
        *,
        capacity: int = 1 << 18,
        num_routers: int = 1,
        seed: int | None = None,
    ) -> None:
        self.costs = costs if costs is not None else RoutingCosts()
        self._prior = self.costs.prior * (1 - 1 / num_routers)
        self._prefixes = HolderMemory(capacity)
        self._media = HolderMemory(capacity)
        self._conversations = Popularity()
        self._items = Popularity()
        self._ring = HashRing()
        self._replicas: dict[str, Replica] = {}
        self._by_number: dict[int, Replica] = {}
        self._healthy: list[str] = []
        self._num_seen = 0
        self._total_wait = 0.0
        self._num_sent = 0.0
        self._fair_share = 0.0
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
        if wanted.keys() == self._replicas.keys():
            return
        for id in [id for id in self._replicas if id not in wanted]:
            self._by_number.pop(self._replicas.pop(id).number)
        for id in wanted:
            if id not in self._replicas:
                replica = Replica(id, self._num_seen)
                replica.num_sent = self._mean_sent
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
            if load.healthy:
                self._forget_content(known)
            self._set_healthy()
        elif load.healthy:
            self._estimate(known)

    def _forget_content(self, replica: Replica) -> None:
        """Take a replica for one without content: its engine has started again."""
        del self._by_number[replica.number]
        replica.number = self._num_seen
        self._num_seen += 1
        self._by_number[replica.number] = replica

    def choose(self, key: RequestKey | None, among: Collection[str] | None = None) -> list[str]:
        """Return a few replicas, the best one first; an empty list when there are none.

        Args:
            key: Content of the request; None when it is not known.
            among: The only replicas that may be chosen; None for all. Those that are not healthy
                are chosen only when no other is left.
        """
        allowed = self._allowed(among)
        if key is None or not (key.prefixes or key.media):
            return self._choose_by_load(allowed)
        ranked = sorted(
            (cost, rank, replica.id)
            for rank, (replica, cost) in enumerate(self._candidates(key, allowed).items())
        )
        chosen = [id for _, _, id in ranked[:MOST_CHOICES]]
        if len(chosen) < 2:
            chosen += [id for id in self._choose_by_load(allowed) if id not in chosen]
        return chosen

    def _allowed(self, among: Collection[str] | None) -> set[str] | None:
        """Return the only replicas that may be chosen; None for all."""
        if among is None:
            return None
        allowed = set(among)
        return None if allowed >= self._replicas.keys() else allowed

    def sent(self, replica: str, key: RequestKey) -> None:
        """Note that a request goes to a replica, which will have its content."""
        known = self._replicas.get(replica)
        if known is None:
            return
        num_known = self._prefixes.num_known(key.prefixes)
        known.sent(key, self._compute(known, key, self._cached(known, key, num_known)))
        self._estimate(known)
        self._count_sent(known)
        self._count(key, num_known)
        clock, evictions = known.clock, known.load.encoder_evictions
        for digest in reversed(key.prefixes):
            self._prefixes.add(digest, known.number, clock)
        for digest, _ in key.media:
            if digest:
                self._media.add(digest, known.number, evictions)

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
        self._share_out()

    @property
    def _mean_sent(self) -> float:
        return self._num_sent / max(1, len(self._healthy))

    def _share_out(self) -> None:
        """Take up again how many of the latest requests a replica may have."""
        self._num_sent = sum(self._replicas[id].num_sent for id in self._healthy)
        self._set_fair_share()

    def _set_fair_share(self) -> None:
        """Compute how many of the latest requests a replica may have: the mean, and its noise."""
        mean = self._mean_sent
        self._fair_share = mean + math.sqrt(mean) + 2

    def _count_sent(self, replica: Replica) -> None:
        """Count a request for the balance; the older half of them counts half."""
        replica.num_sent += 1
        self._num_sent += 1
        self._set_fair_share()
        if self._mean_sent > LATEST:
            for each in self._replicas.values():
                each.num_sent /= 2
            self._share_out()

    def _burden(self, replica: Replica) -> float:
        """Return the wait at a replica, and the cost of what it got beyond its share."""
        beyond = replica.num_sent - self._fair_share
        return replica.wait + self.costs.excess * beyond if beyond > 0 else replica.wait

    def _estimate(self, replica: Replica) -> None:
        before = replica.wait
        change = replica.estimate(self.costs) - before
        if replica.id in self._ring:
            self._total_wait += change

    def _can_take(self, replica: Replica, allowed: set[str] | None) -> bool:
        return replica.load.healthy and (allowed is None or replica.id in allowed)

    def _count(self, key: RequestKey, num_known: int) -> None:
        """Count a request for the popularity of what it begins with.

        Where its prompt leaves what is known, a conversation begins, or goes on for the first time.
        """
        self._items.add(key.media[0][0] if key.media else b"")
        if num_known < len(key.prefixes):
            self._conversations.add(key.prefixes[num_known - 1] if num_known else b"")

    def _candidates(self, key: RequestKey, allowed: set[str] | None) -> dict[Replica, float]:
        """Return replicas to compare, each with its cost."""
        found: dict[Replica, float] = {}
        prefixes = key.prefixes
        num_known = num = self._prefixes.num_known(prefixes)
        while num and len(found) < MOST_CANDIDATES:
            holders = self._prefixes.holders(prefixes[num - 1])
            for replica in self._some(holders, allowed):
                if replica not in found:
                    found[replica] = self._cost(replica, key, num)
            num = self._prefixes.next_wider(prefixes, num)
        for digest, _ in key.media[:MOST_CANDIDATES]:
            if len(found) >= MOST_COMPARED:
                break
            for replica in self._some(self._media.holders(digest), allowed):
                if replica not in found:
                    found[replica] = self._cost(replica, key, num_known)
        place = self._named(key, num_known, allowed)
        if place is not None:
            cost = self._cost(place.replica, key, num_known, place=place)
            found[place.replica] = min(cost, found.get(place.replica, cost))
        return found

    def _some(self, numbers: Collection[int], allowed: set[str] | None) -> list[Replica]:
        """Return some of the holders with these numbers that may be chosen.

        Of many, each in turn from a random one on: a fair sample of them would cost more.
        """
        by_number, found = self._by_number, []
        if len(numbers) > MOST_CANDIDATES:
            ordered = list(numbers)
            first = int(self._random.random() * len(ordered))
            numbers = ordered[first:] + ordered[:first]
        for number in numbers:
            replica = by_number.get(number)
            if replica is not None and self._can_take(replica, allowed):
                found.append(replica)
                if len(found) == MOST_CANDIDATES:
                    break
        return found

    def _named(self, key: RequestKey, num_known: int, allowed: set[str] | None) -> _Place | None:
        """Return the place that the ring names, the first replica that has not too much to do.

        ``num_known``: prefixes that somebody has.
        """
        shared = self._conversations.num_repeated(key.prefixes, num_known)
        own = key.prefixes[shared] if shared < len(key.prefixes) else b""
        if key.media and key.media[0][0]:
            group, share = key.media[0][0], self._items.share(key.media[0][0])
            shared = 0
        elif shared:
            group = key.prefixes[shared - 1]
            share = self._conversations.share(group)
        else:
            group, share = own, 0.0
        digest = self._point(group, own, share)
        mean = self._total_wait / max(1, len(self._healthy))
        most = (1 + self.costs.spread) * mean + self.costs.slack
        length = PREFIX_LENGTHS[shared - 1] if shared else 0
        best: _Place | None = None
        prior, least = self._prior, math.inf
        for id in self._ring.walk(digest, MOST_STEPS):
            replica = self._replicas[id]
            if allowed is not None and id not in allowed:
                continue
            burden = self._burden(replica)
            if burden <= most:
                return _Place(replica, prior, length)
            if burden < least:
                best, least = _Place(replica, prior, length), burden
            prior /= 2
        return best

    def _point(self, group: bytes, own: bytes, share: float) -> bytes:
        """Return the place of content on the ring: one of as many as the group's share needs.

        Linear hashing (Litwin, 1980): when the number grows by one, only the content of one place
        is divided. Without content of its own, a prompt goes to any of the places.
        """
        num = int(share * len(self._healthy) * self.costs.places)
        if num < 2:
            return group
        value = int.from_bytes(own, "little") if own else self._random.getrandbits(32)
        size = 1 << (num - 1).bit_length()
        place = value % size
        if place >= num:
            place = value % (size // 2)
        return blake3(group + place.to_bytes(4, "little")).digest(length=8)

    def _cached(self, replica: Replica, key: RequestKey, num_known: int) -> float:
        """Return how many tokens of the prompt are expected in the replica's cache.

        ``num_known``: prefixes that it may have.
        """
        expected = 0.0
        for num in range(self._prefixes.num_held(key.prefixes, num_known, replica.number), 0, -1):
            length = PREFIX_LENGTHS[num - 1]
            if length <= expected:
                break
            mark = self._prefixes.mark(key.prefixes[num - 1], replica.number)
            if mark is not None:
                trust = replica.trust_prefix(mark)
                expected = max(expected, length * trust)
                if trust == 1:
                    break
        return expected

    def _cost(
        self,
        replica: Replica,
        key: RequestKey,
        num_known: int,
        *,
        place: _Place | None = None,
    ) -> float:
        """Return the cost of a replica for a request: wait and compute."""
        cached, prior = self._cached(replica, key, num_known), 0.0
        if place is not None and key.prefixes:
            prior, longest = place.prior, PREFIX_LENGTHS[len(key.prefixes) - 1]
            cached = max(cached, place.shared + prior * (longest - place.shared))
        return self._burden(replica) + self._compute(replica, key, cached, prior)

    def _compute(
        self, replica: Replica, key: RequestKey, cached: float, prior: float = 0.0
    ) -> float:
        """Return the cost to compute a request at a replica that has ``cached`` tokens of it.

        ``prior``: the probability that it has items that this router has not sent there.
        """
        embeds = 0.0
        for digest, num_embeds in key.media:
            mark = self._media.mark(digest, replica.number)
            there = prior if mark is None else max(prior, replica.trust_item(mark))
            embeds += num_embeds * (1 - there)
        return max(1.0, key.num_tokens - cached) + self.costs.embedding * embeds

    def _choose_by_load(self, allowed: set[str] | None) -> list[str]:
        """Return the better one of two random replicas, and the other."""
        ids: Sequence[str] = self._healthy
        if allowed is not None:
            ids = [id for id in ids if id in allowed] or [i for i in self._replicas if i in allowed]
        if len(ids) > 2:
            ids = self._random.sample(ids, 2)
        return sorted(ids, key=lambda id: self._replicas[id].wait)
