"""The process of a rank that another one leads: ``python -m sensorium.engine.parallel.worker``.

Its arguments are the descriptor of the connection and the id of the first rank's process, with
which it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import sys
import threading
from contextlib import nullcontext
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sensorium.engine.parallel import messages
from sensorium.engine.parallel.messages import (
    AdapterPart,
    Allocated,
    Begin,
    ClearLane,
    Embed,
    Encode,
    Encoded,
    Failed,
    Forward,
    Loaded,
    Logits,
    Ready,
    SetLane,
    Start,
)
from sensorium.errors import SensoriumError
from sensorium.kernels.cpu import threads
from sensorium.processes.start import begin_child, end_process

if TYPE_CHECKING:
    import torch

    from sensorium.distributed.collectives import Collectives
    from sensorium.kernels.batch import AttentionBatch, LayerCache
    from sensorium.models.parts.decoder import DecoderModel

AdapterMessage = AdapterPart | SetLane | ClearLane

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Interval at which the parent is looked for where the system does not tell of its end."""


def main() -> int:
    """Serve the first rank until it closes the connection or ends."""
    begin_child()
    connection, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    threads.prepare()
    try:
        serve(connection, is_own_process=True)
    except OSError:
        return 1  # the first rank has gone
    except Exception:
        logger.critical("a rank cannot go on; this process ends", exc_info=True)
        return 1
    return 0


def _end_with(parent: int) -> None:
    """End this process when its parent does, whatever it waits for."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or it has ended
        watch = select.poll()
        watch.register(os.pidfd_open(parent), select.POLLIN)
        while os.getppid() == parent:
            watch.poll()
    while os.getppid() == parent:
        threading.Event().wait(POLL_SECONDS)
    os._exit(0)


def serve(connection: socket.socket, *, is_own_process: bool) -> None:
    """Load a part of the model as the first message says, then compute until the connection ends.

    is_own_process: nothing else runs here. Raises what went wrong, after the start.
    """
    if is_own_process:
        import sensorium.engine.loading  # noqa: F401  while the first rank looks at the model
    begin = messages.receive_at_rank(connection)
    if not isinstance(begin, Begin):
        return
    try:
        rank = Rank(begin, is_own_process=is_own_process)
        messages.send(connection, messages.encode(rank.loaded))
        start = rank.prepare(connection)
        if start is None:
            return
        rank.allocate(start)
        messages.send(connection, messages.encode(Allocated()))
        rank.join(start)
    except SensoriumError as error:
        failed = Failed(error.message, error.code, error.param)
        messages.send(connection, messages.encode(failed))
        return
    except Exception as error:
        logger.exception("a rank could not start")
        text = f"A rank could not start: {type(error).__name__}: {error}"
        messages.send(connection, messages.encode(Failed(text, "internal_error")))
        return
    messages.send(connection, messages.encode(Ready()))
    try:
        rank.run(connection)
    finally:
        rank.collectives.leave()


class Rank:
    """One rank's part of a decoder with its KV cache. It does what the messages say, in order."""

    collectives: Collectives

    def __init__(self, begin: Begin, *, is_own_process: bool) -> None:
        """Load its part of the model. Raises ConfigError."""
        from sensorium.distributed.collectives import Collectives
        from sensorium.distributed.shard import Shard
        from sensorium.engine.loading import cache_layout, load_model
        from sensorium.engine.parallel.adapters import RankLanes
        from sensorium.models.loading.fill import weight_bytes
        from sensorium.multimodal.items import MODALITIES

        config = begin.config
        self.collectives = Collectives(Shard(begin.rank, begin.size))
        if is_own_process:
            asked = config.model.num_threads
            threads.configure(threads.share(begin.rank, begin.size, asked, keeps=True))
        skipped = MODALITIES if config.parallel.encoder_ranks == "first" else ()
        loaded = load_model(
            config, config.model.device, collectives=self.collectives, skip_modalities=skipped
        )
        self._model = model = cast("DecoderModel", loaded.model)
        self._lanes: RankLanes | None = None
        if config.lora.enable_lora:
            self._lanes = RankLanes(model, config.lora.max_loras)
        self._layout = cache_layout(config, model.shape, model.dtype, self.collectives)
        self._caches: list[LayerCache] = []
        self.loaded = Loaded(weight_bytes(model), messages.described(model))

    def prepare(self, connection: socket.socket) -> Start | None:
        """Take the adapters of the start, and return the message behind them; None for the end."""
        while isinstance(message := messages.receive_at_rank(connection), AdapterMessage):
            self._adapt(message, connection)
        return message if isinstance(message, Start) else None

    def allocate(self, start: Start) -> None:
        """Allocate the KV cache. Raises ConfigError."""
        from sensorium.engine.loading import allocate_cache
        from sensorium.kernels import ops

        model = self._model
        self._caches = allocate_cache(self._layout, start.num_blocks, model.device)
        int8_cache = self._layout.records is not None
        encoders = model.has_encoder
        ops.warm_up(model.dtype, model.device, encoders=encoders, int8_cache=int8_cache)

    def join(self, start: Start) -> None:
        """Meet the other ranks. Raises RuntimeError."""
        timeout = timedelta(seconds=start.timeout)
        self.collectives.join(Path(start.meeting), timeout, start.secret)

    def run(self, connection: socket.socket) -> None:
        """Do what the first rank says until it closes the connection."""
        import torch

        with torch.inference_mode():
            while (message := messages.receive_at_rank(connection)) is not None:
                if isinstance(message, Embed):
                    ids = torch.frombuffer(bytearray(message.ids), dtype=torch.int64)
                    self._model.decoder.embedding(ids.to(self._model.device))
                elif isinstance(message, Forward):
                    self._forward(message)
                elif isinstance(message, Encode):
                    self._encode(message, connection)
                elif isinstance(message, AdapterMessage):
                    self._adapt(message, connection)
                elif isinstance(message, Logits):
                    size = message.num_rows, self._model.shape.hidden_size
                    model = self._model
                    hidden = torch.empty(size, dtype=model.dtype, device=model.device)
                    model.decoder.head(self.collectives.broadcast(hidden))

    def _adapt(self, message: AdapterMessage, connection: socket.socket) -> None:
        """Change the adapters, and answer where the first rank wants it."""
        assert self._lanes is not None
        answer = self._lanes.handle(message)
        if answer is not None:
            messages.send(connection, messages.encode(answer))

    def _encode(self, message: Encode, connection: socket.socket) -> None:
        """Encode items, and send their embeddings to the first rank."""
        import torch

        from sensorium.distributed.collectives import FIRST
        from sensorium.multimodal.items import Features

        try:
            items = [
                Features(
                    item.modality,  # type: ignore[arg-type]
                    {name: array.copy() for name, array in item.arrays.items()},
                    item.num_embeds,
                    item.meta,
                )
                for item in message.items
            ]
            lanes = nullcontext() if self._lanes is None else self._lanes.everywhere(message.lane)
            with lanes:
                rows = torch.cat(self._model.encode(items)).to(self._model.dtype)
            if rows.shape[0] != sum(item.num_embeds for item in items):
                raise RuntimeError(f"the encoder made {rows.shape[0]} embeddings")
        except Exception:
            logger.exception("encoding %d item(s) failed", len(message.items))
            messages.send(connection, messages.encode(Encoded(message.number, failed=True)))
            return
        messages.send(connection, messages.encode(Encoded(message.number)))
        self.collectives.send(rows, FIRST)

    def _forward(self, message: Forward) -> None:
        import torch

        from sensorium.engine.parallel.model import unpacked

        model, num_rows = self._model, sum(message.query_lens)
        row = 2 * message.rotary_size * 4 + message.width * model.dtype.itemsize
        data = torch.empty(num_rows * row, dtype=torch.uint8, device=model.device)
        sizes = num_rows, message.rotary_size, message.width
        cos, sin, embeds = unpacked(self.collectives.broadcast(data), *sizes, model.dtype)
        parts = embeds.split(model.shape.hidden_size, dim=1)
        first, *deep = (part.contiguous() for part in parts)
        lanes = nullcontext() if self._lanes is None else self._lanes.using(message.runs, num_rows)
        with lanes:
            model.decoder.forward(first, self._batch(message, cos, sin), deep)

    def _batch(self, message: Forward, cos: torch.Tensor, sin: torch.Tensor) -> AttentionBatch:
        import torch

        from sensorium.kernels.batch import AttentionBatch

        device, lengths = self._model.device, message.query_lens

        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        table = torch.frombuffer(bytearray(message.block_table), dtype=torch.int32)
        return AttentionBatch(
            query_start=tensor([0, *accumulate(lengths)]),
            kv_len=tensor(message.kv_lens),
            block_table=table.view(len(lengths), -1).to(device),
            num_decodes=message.num_decodes,
            max_query_len=max(lengths),
            max_kv_len=max(message.kv_lens),
            cos=cos,
            sin=sin,
            caches=self._caches,
            query_lens=lengths,
            kv_lens=message.kv_lens,
            invariant=message.invariant,
            adapters=self._lanes.version if self._lanes is not None and message.runs else 0,
        )


if __name__ == "__main__":
    end_process(main())
