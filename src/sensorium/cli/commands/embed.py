"""``sensorium embed``: embeddings of texts and images, as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sensorium.cli.attachments import Attachment, user_message
from sensorium.cli.commands.serve import add_model_argument, take_model_argument
from sensorium.cli.flags import add_engine_flags, build_engine_config, engine_keywords
from sensorium.errors import ConfigError
from sensorium.params import PoolingParams

if TYPE_CHECKING:
    from sensorium.outputs import EmbeddingRequestOutput

DESCRIPTION = (
    "Load a model and print a JSON line with the embedding of each input. A text alone is used as "
    "it is; images, and texts with --chat, become a message that the chat template renders."
)
CHOSEN_HERE = ("runner", "convert", "task")
"""Options that this command sets itself."""

COMMON = {
    "--text": "--text 'a red circle'",
    "--image": "--image page.png",
    "--together": "--text 'a page' --image page.png --together",
    "--input": "--input inputs.jsonl",
    "--output": "--output embeddings.jsonl",
    "--chat": "--chat",
    "--dimensions": "--dimensions 512",
    "--normalize": "--normalize",
    "--dtype": "--dtype bfloat16",
    "--config": "--config embed.yaml",
}


@dataclass(frozen=True, slots=True)
class Input:
    """Text and images of one embedding."""

    text: str
    images: tuple[str, ...] = ()

    def prompt(self, chat: bool) -> dict[str, Any]:
        """Return the input as a prompt of ``LLM.embed``.

        Raises:
            ConfigError: an image cannot be read.
        """
        if not (chat or self.images):
            return {"prompt": self.text}
        message = user_message(self.text, [Attachment("image", source) for source in self.images])
        if not self.text:
            message["content"] = [part for part in message["content"] if part["type"] != "text"]
        return {"messages": [message]}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "embed",
        help="compute embeddings of texts and images",
        usage="%(prog)s [MODEL] [options]",
        description=DESCRIPTION,
    )
    add_model_argument(parser)
    for flag, metavar, what in (
        ("--text", "TEXT", "a text to embed"),
        ("--image", "PATH", "an image to embed (path or URL)"),
    ):
        parser.add_argument(
            flag,
            dest=f"{flag[2:]}s",
            action="append",
            default=[],
            metavar=metavar,
            help=f"{what}; repeatable",
        )
    parser.add_argument(
        "--together",
        action="store_true",
        help="one embedding of all texts and images, as one message",
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        help='JSON lines, each a string or {"text": ..., "images": [...]}; - reads stdin',
    )
    parser.add_argument(
        "--chat", action="store_true", help="use the chat template for texts without images, too"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="file for the lines (default: stdout)"
    )
    parser.add_argument(
        "--dimensions", type=int, metavar="N", help="length of the embeddings (Matryoshka models)"
    )
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="scale embeddings to length 1 (default: as in the model's files)",
    )
    add_engine_flags(parser, without=CHOSEN_HERE)
    parser.common = COMMON
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Compute the embeddings and write them."""
    take_model_argument(arguments)
    build_engine_config(arguments)  # report mistakes before torch is imported
    params = PoolingParams(dimensions=arguments.dimensions, normalize=arguments.normalize)
    inputs = _inputs(arguments)
    prompts = [one.prompt(arguments.chat) for one in inputs]
    path = _output(arguments.output)
    from sensorium.llm import LLM

    with LLM(**{"model": "demo", **engine_keywords(arguments), "runner": "pooling"}) as llm:
        outputs = llm.embed(prompts, pooling_params=params, use_tqdm=True)
    lines = "".join(_lines(inputs, outputs))
    if path is None:
        sys.stdout.write(lines)
    else:
        path.write_text(lines, encoding="utf-8")
    return 0


def _inputs(arguments: argparse.Namespace) -> list[Input]:
    """Return all inputs: those of the file, then texts, then images."""
    texts, images = arguments.texts, tuple(arguments.images)
    inputs = list(_of_file(arguments.input)) if arguments.input else []
    if arguments.together and (texts or images):
        inputs.append(Input(" ".join(texts), images))
    else:
        inputs += [Input(text) for text in texts]
        inputs += [Input("", (image,)) for image in images]
    if not inputs:
        raise ConfigError("There is nothing to embed: give --text, --image or --input.")
    return inputs


def _of_file(name: str) -> Iterator[Input]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--input {name!r} cannot be read: {error}.") from error
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # not splitlines: JSON strings may contain other line ends
        if line.strip():
            yield _of_line(line, number)


def _of_line(line: str, number: int) -> Input:
    try:
        value = json.loads(line)
    except ValueError as error:
        _bad_line(number, f"is not valid JSON: {error}")
    if isinstance(value, str):
        return Input(value)
    if not isinstance(value, dict) or not value or not set(value) <= {"text", "images"}:
        _bad_line(number, 'must be a string or an object of "text" and "images"')
    text, images = value.get("text", ""), value.get("images", [])
    if not isinstance(text, str):
        _bad_line(number, f'has a "text" that is no string: {text!r}')
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        _bad_line(number, f'has "images" that is no list of paths or URLs: {images!r}')
    return Input(text, tuple(images))


def _bad_line(number: int, what: str) -> NoReturn:
    raise ConfigError(f"--input: line {number} {what}.")


def _output(name: str | None) -> Path | None:
    """Return the output file; report a missing folder before the model is loaded."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(
            f"--output {name!r}: its folder does not exist, or it is a folder itself."
        )
    return path


def _lines(inputs: Sequence[Input], outputs: Sequence[EmbeddingRequestOutput]) -> Iterator[str]:
    for index, (one, output) in enumerate(zip(inputs, outputs, strict=True)):
        line: dict[str, Any] = {"index": index}
        if one.text:
            line["text"] = one.text
        if one.images:
            line["images"] = list(one.images)
        line["num_prompt_tokens"] = output.usage.prompt_tokens
        line["num_cached_tokens"] = output.usage.cached_tokens
        line["embedding"] = output.outputs.embedding
        yield json.dumps(line, ensure_ascii=False) + "\n"
