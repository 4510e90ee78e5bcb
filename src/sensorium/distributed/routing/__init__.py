"""Choice of the replica that a request goes to: plain Python, for Ray Serve and for simulations."""

from sensorium.distributed.routing.costs import RoutingCosts
from sensorium.distributed.routing.key import RequestKey, request_key
from sensorium.distributed.routing.load import ReplicaLoad
from sensorium.distributed.routing.router import Router

__all__ = ["ReplicaLoad", "RequestKey", "Router", "RoutingCosts", "request_key"]
