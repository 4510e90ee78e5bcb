"""Sums and exchanges of tensors between the ranks of one model, by ``torch.distributed``'s gloo.

The group is an object of its own, not torch's default group, which a program that uses ``LLM`` may
need for itself.
"""

from __future__ import annotations

import hmac
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from sensorium.distributed.shard import Shard
from sensorium.errors import ConfigError

LOOPBACK = "127.0.0.1"
"""Address of gloo's sockets: nobody outside of this machine can reach them.

Other users of this machine can, as gloo asks nobody who they are; so ranks prove it to each other
in ``join``. What follows is neither signed nor encrypted.
"""
FIRST = 0
"""The rank with the scheduler."""
SMALL_BYTES = 1 << 16
"""Tensors up to this size are exchanged by two ranks and summed by each: two messages at once cost
half of what gloo's own sum costs, which passes through a thread of its own."""


class Collectives:
    """The ranks of one model, of which this process is one; they meet in ``join``.

    All ranks call the same methods in the same order, with tensors of the same shapes. Numbers are
    summed in the order of the ranks, wherever in a tensor they stand: a row has the same bits in
    every batch.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._group: Any = None

    def join(self, meeting: Path, timeout: timedelta, secret: bytes) -> None:
        """Wait for the other ranks, which must know the same secret.

        meeting: a file that does not exist yet, the same for all. timeout: also that of everything
        that follows. Raises RuntimeError when they do not come in time or do not know it, and
        ConfigError where torch was built without gloo.
        """
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_gloo_available():
            raise ConfigError(
                f"tensor_parallel_size is {self.shard.size}, but torch is built without gloo.",
                param="tensor_parallel_size",
            )
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        options._timeout = timeout
        store = dist.FileStore(str(meeting), self.shard.size)
        self._group = gloo(store, self.shard.rank, self.shard.size, options)
        self._broadcast, self._gather = dist.BroadcastOptions(), dist.GatherOptions()
        try:
            for other in range(self.shard.size):
                if other != self.shard.rank:
                    self._check(other, secret)
            self.all_reduce(torch.ones(1))  # what is made for the first sum is made now
        except RuntimeError:
            self.leave()
            raise

    def _check(self, other: int, secret: bytes) -> None:
        """Prove to another rank that this one knows the secret, and let it prove the same.

        Raises RuntimeError where it cannot.
        """
        own = self.shard.rank
        mine = torch.frombuffer(bytearray(_proof(secret, own, other)), dtype=torch.uint8)
        theirs = self._swapped(mine, other).numpy().tobytes()
        if not hmac.compare_digest(theirs, _proof(secret, other, own)):
            raise RuntimeError(f"what answers as rank {other} is another process")

    def leave(self) -> None:
        """Drop the connections to the other ranks."""
        self._group = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' tensors, on each of them; ``x`` becomes it."""
        if not x.is_contiguous():
            x = x.contiguous()
        if self.shard.size == 2 and x.nbytes <= SMALL_BYTES:
            # The order of two numbers changes no bit.
            return x.add_(self._swapped(x, 1 - self.shard.rank))
        if self.shard.size > 2:
            return self._summed_in_order(x)
        self._group.allreduce([x]).wait()
        return x

    def _swapped(self, x: torch.Tensor, other: int) -> torch.Tensor:
        """Send a tensor to another rank, and return the one that it sends."""
        theirs = torch.empty_like(x)
        coming = self._group.recv([theirs], other, 0)
        going = self._group.send([x], other, 0)
        coming.wait()
        going.wait()
        return theirs

    def _summed_in_order(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' tensors; gloo's own order depends on their length."""
        parts = [torch.empty_like(x) for _ in range(self.shard.size)]
        self._group.allgather([parts], [x]).wait()
        torch.add(parts[0], parts[1], out=x)
        for part in parts[2:]:
            x.add_(part)
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first rank's tensor; ``x``, contiguous, becomes it."""
        self._group.broadcast([x], self._broadcast).wait()
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all ranks on the first, none on the others."""
        x = x.contiguous()
        is_first = self.shard.rank == FIRST
        found = [torch.empty_like(x) for _ in range(self.shard.size)] if is_first else []
        self._group.gather([found] if is_first else [], [x], self._gather).wait()
        return found

    def send(self, x: torch.Tensor, rank: int) -> None:
        """Send a tensor to another rank, which calls ``receive``."""
        self._group.send([x.contiguous()], rank, 0).wait()

    def receive(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """Return the tensor that another rank sends; ``x``, contiguous, becomes it."""
        self._group.recv([x], rank, 0).wait()
        return x


def _proof(secret: bytes, rank: int, other: int) -> bytes:
    """Return what one rank shows another, which can show it to nobody as its own."""
    return hmac.digest(secret, f"{rank} to {other}".encode(), "sha256")
