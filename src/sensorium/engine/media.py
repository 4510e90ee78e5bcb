"""The worker processes that decode media for one model, as its frontend starts them."""

from __future__ import annotations

from sensorium.config import EngineConfig
from sensorium.engine import wire
from sensorium.multimodal.decoders import ForkServerCommand, ProcessDecoders
from sensorium.multimodal.segments import SegmentFolder
from sensorium.processes import child_environment, python_module


def process_decoders(config: EngineConfig, folder: SegmentFolder) -> ProcessDecoders:
    """Decoders whose processes build the model's processor by themselves, at the first item or at ``start``."""
    command = ForkServerCommand(
        python_module("sensorium.engine.media_worker", str(folder.path)),
        child_environment(one_thread=True),
        wire.encode(wire.Configure(config)),
    )
    return ProcessDecoders(command, config.media, folder)
