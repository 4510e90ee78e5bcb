"""The fork server of media workers: ``python -m sensorium.engine.prompts.media_worker FOLDER DESCRIPTOR``.

Started by ``engine.prompts.media_workers`` with the folder of the segments and the descriptor of
its control socket, through which the configuration comes first. All it adds to
``multimodal.workers.decode_worker`` is the model's processor.
"""

from __future__ import annotations

import logging
import socket
import sys

from sensorium import environment
from sensorium.engine import wire
from sensorium.models import loader
from sensorium.models.registry import resolve
from sensorium.multimodal.workers.decode_worker import serve
from sensorium.processes.framing import receive_frame


def main() -> int:
    """Build the processor, then fork workers until the other side closes."""
    logging.basicConfig(
        level=environment.log_level(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    folder, control = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    first = receive_frame(control)
    if first is None:
        return 0  # who started this has gone
    message = wire.decode_to_engine(first)
    if not isinstance(message, wire.Configure):
        return 1
    config = message.config
    model = config.model
    loaded = loader.read_config(
        model.model,
        revision=model.revision,
        hf_overrides=model.hf_overrides,
        download_dir=model.download_dir,
    )
    processor = resolve(loaded.config).build_processor(loaded)
    if processor is None:
        return 1
    serve(control, processor, config.media, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
