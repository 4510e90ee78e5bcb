"""The models of a configuration, each with the way to start its engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from sensorium.config import GIB, EngineConfig, ServedConfig, ServerConfig
from sensorium.engine.serving.frontend import Frontend
from sensorium.engine.serving.process import EngineProcess
from sensorium.models.needs import NVIDIA, least_memory
from sensorium.processes.limits import available_memory
from sensorium.server.models.facts import read_facts
from sensorium.server.models.lookup import ServedModels
from sensorium.server.models.memory import SharedMemory
from sensorium.server.models.served import ServedModel

SHARED_FRACTION = 0.9
"""Part of the available memory that several models may take together by default."""
_GPU_MEMORY = (
    "import torch; print(torch.cuda.get_device_properties(0).total_memory"
    " if torch.cuda.is_available() else 0)"
)


def served_models(
    configs: Sequence[ServedConfig], server: ServerConfig, process: EngineProcess | None = None
) -> ServedModels:
    """Return the models of a server; none is started.

    ``process``: that of the first engine that starts, where it has been started already.
    """
    spare = [process] if process is not None else []

    def new(config: ServedConfig) -> ServedModel:
        async def start(engine: EngineConfig) -> Frontend:
            return await Frontend.start(
                engine,
                trust_request_chat_template=config.server.trust_request_chat_template,
                process=spare.pop() if spare else None,
            )

        return ServedModel(config, start)

    memory = None
    if len(configs) > 1:
        memory = SharedMemory(_total(configs, server), len(configs), _least)
    return ServedModels([new(config) for config in configs], memory, read_facts=read_facts)


def _total(configs: Sequence[ServedConfig], server: ServerConfig) -> int:
    """Return the bytes of memory that all engines may take together."""
    if server.models_memory_gb is not None:
        return int(server.models_memory_gb * GIB)
    on_gpu = [c for c in configs if c.engine.model.device != "cpu"] if NVIDIA.exists() else []
    if on_gpu:
        # In a process of its own: this one must not hold memory of the GPU, nor load torch.
        command = [sys.executable, "-c", _GPU_MEMORY]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if found.isdigit() and int(found):
            return int(int(found) * min(c.engine.cache.gpu_memory_utilization for c in on_gpu))
    return int(available_memory() * SHARED_FRACTION)


def _least(config: EngineConfig) -> int:
    num_ranks = config.parallel.tensor_parallel_size
    kept = least_memory(config.model, config.cache.kv_cache_dtype, num_ranks)
    return kept + (config.cache.kv_cache_memory_bytes or 0)
