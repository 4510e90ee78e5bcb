"""Reads the small files of published checkpoints as the loader does, and compares with what
`transformers` reads.

    python -m tests.checkpoints.published FOLDER

FOLDER holds a folder per checkpoint: config.json, and what there is of index, processor, tokenizer,
templates and generation defaults, without weights. Prints a line per checkpoint, and what differs;
the status is 1 when anything does. Processors that are published alone are read with the
configuration of a neighbour: see COMPLETED_BY.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sensorium.config import engine_config
from sensorium.engine.prompts.defaults import generation_values, sampling_defaults
from sensorium.errors import ConfigError
from sensorium.models import loader
from sensorium.models.embedder import embedder_of
from sensorium.models.interface import BuildOptions, Family, LoadedConfig, stop_token_ids
from sensorium.models.loading import checkpoint
from sensorium.models.loading.quantization import settings_of
from sensorium.models.loading.weight_files import indexed_weights
from sensorium.models.loading.weights import ALWAYS_IGNORED, renamed
from sensorium.models.media.pixels import read_normalization
from sensorium.models.registry import resolve
from sensorium.params import SamplingParams
from sensorium.text.chat.template_files import compile_template, find_templates
from sensorium.text.tokenizer import Tokenizer
from tests.models.harness import picture

PIXELS = ((480, 640), (37, 900), (1024, 1024))
"""Height and width of the images that both processors are given."""
Check = Callable[[LoadedConfig, Family], Iterator[str]]


def check_sizes(loaded: LoadedConfig, family: Family) -> Iterator[str]:
    """The decoder is that of transformers' configuration class, where there is one."""
    from transformers import CONFIG_MAPPING

    kind = loaded.config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return
    text = CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(loaded.config))).get_text_config()
    shape = family.shape(loaded)
    model: Any = family.build_model(loaded, BuildOptions(torch.bfloat16, torch.device("cpu")))
    decoder = model.decoder.config
    compared = {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": decoder.inner_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": decoder.norm_eps,
        "hidden_act": decoder.activation,
    }
    for name, found in compared.items():
        if found != getattr(text, name):
            yield f"{name} is {found}, not {getattr(text, name)}"
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if shape.head_dim != head_dim:
        yield f"head_dim is {shape.head_dim}, not {head_dim}"
    if decoder.rope_theta != text.rope_parameters["rope_theta"]:
        yield f"rope_theta is {decoder.rope_theta}, not {text.rope_parameters['rope_theta']}"


def check_weights(loaded: LoadedConfig, family: Family) -> Iterator[str]:
    """Every weight that the model wants is in the index and the other way round, and all have
    the size that it says.
    """
    weights = indexed_weights(Path(loaded.folder))
    if weights is None or settings_of(loaded) is not None:
        return
    head = embedder_of(loaded, family, "auto") is None
    options = BuildOptions(torch.bfloat16, torch.device("cpu"), head=head)
    model = family.build_model(loaded, options)
    rules = [(re.compile(pattern), replacement) for pattern, replacement in family.renames]
    stored = {renamed(name, rules) for name in weights}
    slots = [slot for slot in model.slots() if slot.tied is None or slot.parts[0].name in stored]
    wanted = {part.name: part for slot in slots for part in slot.parts}
    missing = sorted(set(wanted) - stored)
    skip = re.compile("|".join((*ALWAYS_IGNORED, *model.ignored_weights)))
    beyond = MORE.get(Path(loaded.folder).name, ())
    others = [name for name in stored - set(wanted) if not skip.fullmatch(name)]
    extra = sorted(name for name in others if not name.startswith(beyond))
    if missing or extra:
        yield f"weights missing: {missing[:4]}, of no use: {extra[:4]}"
    index = json.loads((Path(loaded.folder) / "model.safetensors.index.json").read_text())
    total = (index.get("metadata") or {}).get("total_size")
    if not total or stored - set(wanted):
        return
    numbers = sum(torch.Size(part.shape).numel() for part in wanted.values())
    if total not in (2 * numbers, 4 * numbers):
        yield f"{numbers} numbers are wanted, but the files have {total} bytes"


def check_images(loaded: LoadedConfig, family: Family) -> Iterator[str]:
    """An image is as many embeddings as transformers' image processor makes of it, with the same
    normalisation.
    """
    try:
        processor: Any = family.build_processor(loaded)
    except ConfigError as error:
        if "tokenizer" in error.message:  # some take ids from it, and not all folders have one
            return
        raise
    if processor is None or "image" not in processor.modalities or not loaded.preprocessor:
        return
    reference = _image_processor(loaded)
    if reference is not None:
        own = read_normalization(loaded.preprocessor)
        if (own.mean, own.std) != (tuple(reference.image_mean), tuple(reference.image_std)):
            yield f"images are normalised by {own}"
    for height, width in PIXELS:
        image = picture(height, width, 0)
        found = processor.process("image", image, {}).num_embeds
        if found < 1:
            yield f"an image of {height} x {width} has {found} embeddings"
        if reference is None:
            continue
        made = reference(image, return_tensors="pt", input_data_format="channels_last")
        if "image_grid_thw" in made:
            expected = int(made["image_grid_thw"].prod()) // reference.merge_size**2
        elif made["pixel_values"].ndim == 4:  # one crop, which the tower cuts into patches
            side = made["pixel_values"].shape[-1] // loaded.config["vision_config"]["patch_size"]
            expected = side * side
        else:  # tiles, of which the model itself drops some
            continue
        if found != expected:
            yield f"an image of {height} x {width} has {found} embeddings, not {expected}"


def _image_processor(loaded: LoadedConfig) -> Any:
    """Transformers' processor with the values that the loader found.

    None for those whose code is in the checkpoint.
    """
    import transformers

    name = str(loaded.preprocessor.get("image_processor_type", "")).removesuffix("Fast")
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name, None)
    return None if kind is None else kind(**loaded.preprocessor)


def check_defaults(loaded: LoadedConfig, family: Family) -> Iterator[str]:
    """The sampling defaults are values of the file, and the ids that end an answer those that it
    lists.
    """
    generation = loaded.generation
    found = sampling_defaults(generation_values(generation, engine_config(model="demo").model))
    SamplingParams(**found)
    if generation.get("do_sample") is not False:
        for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
            if found.get(name) != generation.get(name):
                yield f"{name} is {found.get(name)}, not {generation.get(name)}"
    listed = generation.get("eos_token_id", loaded.config.get("eos_token_id"))
    expected = listed if isinstance(listed, list) else [listed]
    if listed is not None and list(stop_token_ids(loaded)) != list(dict.fromkeys(expected)):
        yield f"answers end with {stop_token_ids(loaded)}, not {expected}"


def check_templates(loaded: LoadedConfig, family: Family) -> Iterator[str]:
    """A template is found wherever a file has one, and all compile."""
    folder = Path(loaded.folder)
    found = find_templates(folder, fallback=family.chat_template())
    for source in found.values():
        compile_template(source)
    own = [
        path.name
        for path in sorted(folder.glob("*.json"))
        if isinstance(json.loads(path.read_text()), dict)
        and json.loads(path.read_text()).get("chat_template")
    ]
    if (own or (folder / "chat_template.jinja").is_file()) and "default" not in found:
        yield f"no template is found, but {own} has one"


def check_tokenizer(loaded: LoadedConfig, family: Family) -> Iterator[str]:
    """The tokenizer is read, and gives the ids of transformers'."""
    folder = Path(loaded.folder)
    if not (folder / "tokenizer.json").is_file():
        return
    from transformers import AutoTokenizer

    text = "The quick brown fox, naïve 你好 <image> 12345\n\n  end"
    own = Tokenizer.from_folder(folder).encode(text)
    library = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    theirs = library(text)["input_ids"]
    if own != theirs:
        yield f"ids are {own[:12]}, not {theirs[:12]}"


CHECKS: dict[str, Check] = {
    "sizes": check_sizes,
    "weights": check_weights,
    "images": check_images,
    "defaults": check_defaults,
    "templates": check_templates,
    "tokenizer": check_tokenizer,
}


def report(folder: Path, overrides: dict[str, Any] | None = None) -> tuple[str, list[str]]:
    """What a checkpoint is, in a line, and what of it differs."""
    if not (folder / "config.json").is_file():
        try:
            checkpoint.read(folder)
        except ConfigError as error:
            return f"no config.json: {error.message}", []
    loaded = loader.read_config(str(folder), hf_overrides=overrides)
    family = resolve(loaded.config)
    quantization = settings_of(loaded)
    problems = []
    for name, check in CHECKS.items():
        try:
            problems += [f"{name}: {what}" for what in check(loaded, family)]
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
    makes = "text" if embedder_of(loaded, family, "auto") is None else "vectors"
    if quantization is not None:
        problem = quantization.problem()
        makes += f", {quantization.label}" if problem is None else f", refused: {problem}"
    shape = family.shape(loaded)
    sizes = f"{shape.num_layers} layers of {shape.hidden_size}, context {shape.max_position}"
    return f"{family.name}, {sizes}: {makes}", problems


def completed(folder: Path, others: Path, scratch: Path) -> tuple[Path, dict[str, Any] | None]:
    """The folder with what lies elsewhere.

    Processors that are saved alone get the configuration of their model, and Ultravox that of its
    decoder.
    """
    base = COMPLETED_BY.get(folder.name)
    if base is not None and (others / base).is_dir():
        whole = scratch / folder.name
        whole.mkdir()
        for name, source in (("config.json", others / base),):
            (whole / name).symlink_to(source / name)
        for file in folder.iterdir():
            if file.name != "adapter_config.json":
                (whole / file.name).symlink_to(file)
        return whole, None
    decoder = DECODERS.get(folder.name)
    if decoder is not None and (others / decoder).is_dir():
        text = scratch / f"{folder.name}-text"
        text.mkdir()
        config = json.loads((others / decoder / "config.json").read_text())
        config.pop("quantization_config", None)
        (text / "config.json").write_text(json.dumps(config))
        return folder, {"text_model_id": str(text)}
    return folder, None


COMPLETED_BY = {
    "llava-1.5-t5-saved": "llava-1.5-7b-hf",
    "qwen2-vl-t5-saved": "qwen2-vl-7b-ain",
    "vlm2vec-processor": "phi-3.5-vision-instruct",
    "ort-ext-phi-3-mini": "phi-3-mini-4k-instruct",
    "ort-ext-phi-3-vision": "phi-3-vision-128k",
}
MORE: dict[str, tuple[str, ...]] = {"minicpm-v-2_6-scicore": ("gene_", "nicheformer.")}
"""Models of somebody's own, which have weights (whose names begin so) that the family does not:
they are refused."""
DECODERS = {
    "ultravox-v0_5-llama-3_2-1b": "llama-3.2-1b-instruct",
    "ultravox-v0_6-llama-3_1-8b": "llama-3.1-8b-bnb",
}


def main(root: Path) -> int:
    """Check every folder below ``root``; the exit status."""
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            what, problems = report(*completed(folder, root, Path(scratch)))
            print(f"{'differs' if problems else 'ok':8}{folder.name}: {what}")
            for problem in problems:
                print(f"        {problem}")
            failed += bool(problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
