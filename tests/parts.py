"""An ``LLM`` of parts that a test holds: engine, runner, scheduler, input processor, event loop."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sensorium import LLM, forks
from sensorium.config import EngineConfig, engine_config
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.core.scheduler import Scheduler
from sensorium.engine.engine import Engine
from sensorium.engine.executor import build_parts
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.prompts.types import PreparedPrompt, parse_prompt
from sensorium.models import loader
from sensorium.models.registry import resolve
from sensorium.multimodal.items import Features
from sensorium.multimodal.processor import Processor
from sensorium.multimodal.workers.event_loop import LoopThread
from sensorium.runtime.encoder import FeatureStore
from sensorium.runtime.runner import ModelRunner

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parts:
    """An LLM and what it is made of."""

    llm: LLM
    engine: Engine
    runner: ModelRunner
    scheduler: Scheduler
    store: FeatureStore
    processor: InputProcessor
    loop: LoopThread

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the event loop on which prompts are prepared."""
        return self.loop.submit(work).result(60)

    def prepare(self, prompt: object) -> PreparedPrompt:
        """Prepare one prompt as ``LLM.generate`` takes it."""
        media = self.llm.config.media
        parsed = parse_prompt(prompt, enable_mm_embeds=media.enable_mm_embeds)
        return self.run(self.processor.prepare(parsed))

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *error: object) -> None:
        self.llm.close()


class PatientEngine(Engine):
    """An engine that has nothing to do at the first look after each change.

    A call so waits for the prompts that are being prepared, and they come together, however long
    their media take: else it depends on the machine how many of them compete for blocks.
    """

    was_asked = False

    def add(self, request: EngineRequest, features: tuple[Features, ...] = ()) -> None:
        self.was_asked = False
        super().add(request, features)

    def step(self) -> list[SequenceUpdate]:
        self.was_asked = False
        return super().step()

    @property
    def has_work(self) -> bool:
        again, self.was_asked = self.was_asked, True
        return again and super().has_work


def processor_of(model: str | Path) -> Processor:
    """Return the processor of a multimodal checkpoint."""
    loaded = loader.read_config(str(model))
    processor = resolve(loaded.config).build_processor(loaded)
    assert processor is not None
    return processor


def build_llm(model: str | Path, **options: Any) -> Parts:
    """Build an LLM as ``LLM(model, **options)`` does, and keep its parts."""
    return _assembled(Engine, engine_config(model=str(model), **options))


def build_patient(model: str | Path, **options: Any) -> Parts:
    """Build an LLM with a ``PatientEngine``, and keep its parts."""
    return _assembled(PatientEngine, engine_config(model=str(model), **options))


def patient_llm(model: str | Path, **options: Any) -> LLM:
    """Build an LLM with a ``PatientEngine``."""
    return build_patient(model, **options).llm


def _assembled(kind: type[Engine], config: EngineConfig) -> Parts:
    forks.begin_computing()
    processor = InputProcessor(config, trust_request_chat_template=True, package_files=True)
    parts, loop = build_parts(config), LoopThread("loop")
    engine = parts.engine(kind)
    llm = LLM.from_parts(config, engine, processor, loop)
    return Parts(llm, engine, parts.runner, parts.scheduler, parts.store, processor, loop)
