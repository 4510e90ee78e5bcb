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
        slack: Wait that is always acceptable.
        full: Use of the KV cache from which requests wait for blocks.
        blocked: Cost of a KV cache that is entirely in use.
    """

    sequence: float = 32.0
    embedding: float = 4.0
    spread: float = 0.25
    slack: float = 512.0
    full: float = 0.9
    blocked: float = 4096.0
