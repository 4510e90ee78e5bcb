"""The fork server of media workers.

``python -m sensorium.engine.prompts.media_worker FOLDER DESCRIPTOR``.

Started by ``engine.prompts.media_workers`` with the folder for features and the descriptor of its
control socket, through which the configuration comes first. Adds the model's processor to
``multimodal.workers.decode_worker``.
"""

from __future__ import annotations

import sys

from sensorium.engine import wire
from sensorium.models import loader
from sensorium.models.registry import resolve
from sensorium.multimodal.workers.decode_worker import serve
from sensorium.processes.fork_server import begin_server


def main() -> int:
    """Build the processor, then fork workers until the other side closes."""
    folder, descriptor = sys.argv[1:]
    control, first = begin_server(descriptor)
    if first is None:
        return 0  # the parent has ended
    message = wire.decode_to_engine(first)
    if not isinstance(message, wire.Configure):
        return 1
    config = message.config
    loaded = loader.read_config_of(config.model)
    processor = resolve(loaded.config).build_processor(loaded)
    if processor is None:
        return 1
    serve(control, processor, config.media, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
