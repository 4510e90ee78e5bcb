"""``build_processor``: a model as a step of a pipeline of Ray Data."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sensorium.config import EngineConfig, engine_config
from sensorium.errors import ConfigError
from sensorium.ray.cluster import require_ray
from sensorium.ray.data.prompts import READ, PromptAnswer, PromptPreparation
from sensorium.ray.data.stages import COLUMN, Pool, Row, gpus_of, packed, through_stages, unpacked

if TYPE_CHECKING:
    from ray.data import Dataset

Change = Callable[[dict[str, Any]], Mapping[str, Any]]
"""A function of a row that returns another row."""


@dataclass(frozen=True, slots=True)
class Processor:
    """A model as a function of a ``ray.data.Dataset``; ``build_processor`` makes it.

    Nothing runs until the result is read.
    """

    config: EngineConfig
    preprocess: Change | None
    postprocess: Change | None
    preparing: Pool
    answering: Pool

    def __call__(self, dataset: Dataset) -> Dataset:
        """Return the rows with the model's outputs, not in order unless Ray Data keeps it."""
        rows = through_stages(
            dataset.map(functools.partial(_packed, change=self.preprocess)),
            functools.partial(PromptPreparation, self.config),
            functools.partial(PromptAnswer, self.config),
            self.preparing,
            self.answering,
        )
        return rows.map(functools.partial(_unpacked, change=self.postprocess))


def build_processor(
    model: str | EngineConfig,
    *,
    preprocess: Change | None = None,
    postprocess: Change | None = None,
    concurrency: int | tuple[int, int] = 1,
    media_concurrency: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    num_cpus: float = 1.0,
    num_gpus: float | None = None,
    **keywords: Any,
) -> Processor:
    """Return a step of a pipeline of Ray Data that runs a model over its rows.

    A row has ``messages`` (a conversation, as ``LLM.chat`` takes it), ``prompt`` or
    ``prompt_token_ids``, with ``multi_modal_data`` and its kin as in the prompts of
    ``LLM.generate``, and may have ``sampling_params`` or ``pooling_params``, each a dict. The
    columns of the dataset are passed on. Added are ``generated_text``, ``generated_tokens``,
    ``finish_reason``, ``num_input_tokens`` and ``num_generated_tokens``, of an embedding model
    ``embedding`` and ``num_input_tokens``; and ``error``: None, or for a row that cannot be served
    a dict of ``message``, ``code`` and ``param``, in which case the others are None.

    Prompts are rendered and tokenized and media are loaded, behind the same guard and with the
    same limits as in a server, in processes of their own; engines get them ready. A process that
    is lost is replaced, and its rows run again, each alone.

    Args:
        model: Model, as for ``LLM``, or the whole configuration of an engine.
        preprocess: Makes the row that the model sees of a row of the dataset. What it raises ends
            the job.
        postprocess: Makes the row of the result, of the columns of the dataset, those that
            ``preprocess`` has added for it, and the outputs.
        concurrency: Engines, or their least and greatest number.
        media_concurrency: Processes that prepare prompts and media; as many as engines by default.
        batch_size: Rows that an engine has at a time; twice ``max_num_seqs`` by default.
        num_cpus: CPUs that Ray reserves for each engine.
        num_gpus: GPUs that Ray reserves for each engine; by default as many as its device says.
        **keywords: Engine options, as for ``LLM``.

    Raises:
        ConfigError: Ray is not installed, or an option is wrong or unknown.
    """
    require_ray()
    config = _config(model, keywords)
    engines = _bounds(concurrency, "concurrency")
    ahead = (
        engines if media_concurrency is None else _bounds(media_concurrency, "media_concurrency")
    )
    rows = 2 * config.scheduler.max_num_seqs if batch_size is None else batch_size
    if rows < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.", param="batch_size")
    gpus = gpus_of(config) if num_gpus is None else num_gpus
    preparing = Pool(*ahead, max(1, rows * engines[1] // ahead[1]), 1.0)
    answering = Pool(*engines, rows, num_cpus, gpus)
    return Processor(config, preprocess, postprocess, preparing, answering)


def _config(model: str | EngineConfig, keywords: Mapping[str, Any]) -> EngineConfig:
    if isinstance(model, str):
        return engine_config(model=model, **keywords)
    if keywords:
        raise ConfigError(
            f"Engine options go into the configuration: {', '.join(keywords)}.",
            param=next(iter(keywords)),
        )
    return model


def _bounds(given: int | tuple[int, int], name: str) -> tuple[int, int]:
    least, most = (given, given) if isinstance(given, int) else given
    if not 1 <= least <= most:
        raise ConfigError(
            f"{name} must be a number from 1, or a pair of a lower and an upper one, got {given}.",
            param=name,
        )
    return least, most


def _packed(given: dict[str, Any], change: Change | None) -> dict[str, bytes]:
    """Return a row of a dataset as the stages take it."""
    row = {name: _plain(value) for name, value in given.items()}
    seen = dict(change(dict(row))) if change is not None else row
    work = {name: value for name, value in seen.items() if name in READ}
    kept = row | {name: value for name, value in seen.items() if name not in READ}
    return {COLUMN: packed(Row(work or dict.fromkeys(seen), kept, key=_key()))}


class _Place(threading.local):
    """Place in the output of the task that runs in this thread."""

    task: str | None = None
    num_rows = 0


_place = _Place()


def _key() -> str:
    """Return the name of the next row of a task, the same when the task runs again."""
    import ray

    task = ray.get_runtime_context().get_task_id()
    if task != _place.task:
        _place.task, _place.num_rows = task, 0
    _place.num_rows += 1
    return f"{task}-{_place.num_rows}"


def _plain(value: Any) -> Any:
    """Return a value as it was before a table took it.

    Tables keep lists as arrays, and give all dicts of a column the keys of all of them.
    """
    if isinstance(value, np.ndarray) and (value.dtype == object or value.ndim == 1):
        return [_plain(member) for member in value.tolist()]
    if isinstance(value, Mapping):
        return {name: _plain(member) for name, member in value.items() if member is not None}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    return value.item() if isinstance(value, np.generic) else value


def _unpacked(row: Mapping[str, bytes], change: Change | None) -> dict[str, Any]:
    """Return the row of the result."""
    done = unpacked(row[COLUMN])
    columns = {**done.given, **done.result}
    return columns if change is None else dict(change(columns))
