"""Detection of embedding models and their pooling from the checkpoint's files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.models.configs import ties_head
from sensorium.models.interface import Family, LoadedConfig
from sensorium.models.loading.weight_files import weight_names
from sensorium.params import PoolingParams

HEADS = ("lm_head.weight", "lm_head.qweight", "lm_head.weight_packed")
"""Ends of names of an output head, plain or quantized."""
MODULES = "modules.json"
"""The list of steps in a folder of the sentence-transformers layout."""

PUBLISHED = (
    ("VLM2Vec", "TIGER-Lab/VLM2Vec-Full", "Phi3VForCausalLM"),
    ("DSE-Qwen2", "MrLight/dse-qwen2-2b-mrl-v1", "Qwen2VLForConditionalGeneration"),
    ("Qwen3-Embedding", "Qwen/Qwen3-Embedding-0.6B", "Qwen3ForCausalLM"),
    ("E5-Mistral", "intfloat/e5-mistral-7b-instruct", "MistralModel"),
)
"""(name, checkpoint, architecture) of embedding models that the docs name."""

GENERATES = (
    "This model generates text here and returns no embeddings. Start it with --runner pooling "
    "(runner='pooling' in Python) for those."
)
"""Error for requests for an embedding to a model that generates text."""

POOLS = (
    "This model returns embeddings here and generates no text: ask for embeddings, or start it "
    "with --runner generate (runner='generate' in Python)."
)
"""Error for requests for text to an embedding model."""

_HOW_TO_CUT = (
    'If its makers trained it for that, start with hf_overrides={"is_matryoshka": true}, or with '
    '{"matryoshka_dimensions": [...]} that lists the sizes.'
)


@dataclass(frozen=True, slots=True)
class Embedder:
    """Pooling of an embedding model: the hidden state after the final norm at the last token.

    ``size``: dimensions of a full embedding. ``normalize``: scale it to length 1 unless the request
    says otherwise. ``matryoshka``: embeddings may be cut, to ``sizes`` only, or to any size when
    that is empty.
    """

    size: int
    normalize: bool = True
    matryoshka: bool = False
    sizes: tuple[int, ...] = ()

    def resolve(self, params: PoolingParams) -> PoolingParams:
        """Return the parameters with defaults filled in.

        Raises InvalidRequestError for a size that the model does not have.
        """
        if params.dimensions not in (None, self.size):
            self._check_cut(params.dimensions or 0)
        if params.normalize is None:
            return params.replace(normalize=self.normalize)
        return params

    def _check_cut(self, dimensions: int) -> None:
        if not self.matryoshka:
            raise InvalidRequestError(
                f"dimensions is {dimensions}, but this model's embeddings have {self.size} and are "
                f"not known to be of use when cut. {_HOW_TO_CUT}",
                param="dimensions",
            )
        if self.sizes and dimensions not in self.sizes:
            known = ", ".join(map(str, self.sizes))
            raise InvalidRequestError(
                f"dimensions is {dimensions}, but this model's embeddings can be cut to {known} "
                "only.",
                param="dimensions",
            )
        if dimensions > self.size:
            raise InvalidRequestError(
                f"dimensions is {dimensions}, but this model's embeddings have {self.size}.",
                param="dimensions",
            )


def embedder_of(loaded: LoadedConfig, family: Family, runner: str) -> Embedder | None:
    """Return the pooling of an embedding model, or None for a model that generates text.

    ``runner`` ``auto`` is ``pooling`` for a folder of the sentence-transformers layout, for an
    architecture without a language-model head, and for a checkpoint of another that stores none and
    does not tie it. Raises ConfigError for steps that are not available here.
    """
    folder = Path(loaded.folder)
    listed = (folder / MODULES).is_file()
    if runner == "generate" or (
        runner == "auto"
        and not (listed or _names_no_head(loaded, family) or _stores_no_head(loaded, family))
    ):
        return None
    if loaded.config.get("is_causal") is False:
        raise ConfigError(
            "The model's tokens attend to those behind them too (is_causal is false in "
            "config.json), which is not available here.",
            param="model",
        )
    sizes = _sizes(loaded.config)
    return Embedder(
        size=family.shape(loaded).hidden_size,
        normalize=_normalizes(folder) if listed else True,
        matryoshka=bool(sizes) or loaded.config.get("is_matryoshka") is True,
        sizes=sizes,
    )


def _names_no_head(loaded: LoadedConfig, family: Family) -> bool:
    architectures = loaded.config.get("architectures") or []
    return any(name in architectures for name in family.embedders)


def _stores_no_head(loaded: LoadedConfig, family: Family) -> bool:
    """Return whether the files of a native family lack a head that is not tied to the embedding.

    That is so for those of Qwen3-VL-Embedding. False where the names of the weights are not known
    yet.
    """
    if not family.embedders or ties_head(loaded.config):
        return False
    names = weight_names(Path(loaded.folder))
    return names is not None and not any(name.endswith(HEADS) for name in names)


def _sizes(config: dict[str, Any]) -> tuple[int, ...]:
    value = config.get("matryoshka_dimensions") or []
    if not isinstance(value, list) or not all(type(size) is int and size > 0 for size in value):
        raise ConfigError(
            "config.json: matryoshka_dimensions must be a list of positive integers, got "
            f"{value!r}.",
            param="hf_overrides",
        )
    return tuple(sorted(value))


def _normalizes(folder: Path) -> bool:
    """Return whether the steps of ``modules.json`` end with a normalisation.

    Raises ConfigError for an unknown step.
    """
    steps = _read(folder / MODULES)
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ConfigError(f"{MODULES} of the model is not a list of modules.", param="model")
    kinds = [str(step.get("type", "")).rpartition(".")[2] for step in steps]
    for step, kind in zip(steps, kinds, strict=True):
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ConfigError(
                f"{MODULES} of the model has the step {kind!r}, which is not available here: only "
                "Transformer, Pooling of the last token and Normalize are.",
                param="model",
            )
        if kind == "Pooling":
            _check_pooling(folder / Path(str(step.get("path", ""))).name / "config.json")
    return "Normalize" in kinds


def _check_pooling(path: Path) -> None:
    settings = _read(path)
    if not isinstance(settings, dict):
        raise ConfigError(
            "The settings of the model's pooling are not a JSON object.", param="model"
        )
    prefix = "pooling_mode_"
    modes = {k.removeprefix(prefix) for k, v in settings.items() if k.startswith(prefix) and v}
    if settings.get("pooling_mode"):
        modes = set(str(settings["pooling_mode"]).split("+"))
    if modes != {"lasttoken"}:
        raise ConfigError(
            f"The model pools by {', '.join(sorted(modes)) or 'an unknown rule'}; only pooling of "
            "the last token (lasttoken) is available here.",
            param="model",
        )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path.name} of the model's pooling cannot be read: {type(error).__name__}.",
            param="model",
        ) from error
