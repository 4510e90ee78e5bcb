"""Constants of the formula by which replicas are compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoutingCosts:
    """Constants of a router. Costs are in tokens of a prompt that must be computed.

    Attributes:
        sequence: Cost of a sequence that runs or waits at a replica, for those behind it.
        embedding: Cost to encode one embedding of an item of media.
        spread: A replica takes content that is new to it while its wait is at most ``1 + spread``
            times the mean, plus ``slack``.
        places: Replicas for popular content, by its share of the requests; 1 is just enough when
            they do nothing else.
        prior: Share of a prompt that the replica which the ring names is expected to have, beyond
            what this router has sent there, when nearly all requests go to other routers.
        slack: Wait that is always acceptable.
        excess: Cost of each of the latest requests that a replica got beyond its share.
        full: Use of the KV cache from which requests wait for blocks.
        blocked: Cost of a KV cache that is entirely in use.
    """

    sequence: float = 32.0
    embedding: float = 4.0
    spread: float = 0.5
    slack: float = 1024.0
    places: float = 2.0
    prior: float = 0.75
    excess: float = 192.0
    full: float = 0.9
    blocked: float = 4096.0
