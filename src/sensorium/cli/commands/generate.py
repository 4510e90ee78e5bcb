"""``sensorium generate``: answer one prompt."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensorium.cli.attachments import add_attachment_flags, user_message
from sensorium.cli.chat.control import shown
from sensorium.cli.flags import add_engine_flags, build_engine_config, engine_keywords
from sensorium.cli.sampling import add_sampling_flags, sampling_values
from sensorium.errors import ConfigError

if TYPE_CHECKING:
    from sensorium.llm import LLM
    from sensorium.outputs import RequestOutput
    from sensorium.params import SamplingParams

DESCRIPTION = "Load a model, answer one prompt and print the text."

COMMON = {
    "--model": "--model llava-hf/llava-1.5-7b-hf",
    "--image": "--image photo.jpg",
    "--video": "--video clip.mp4",
    "--audio": "--audio question.wav",
    "--system": "--system 'Answer in one sentence.'",
    "--temperature": "--temperature 0",
    "--max-tokens": "--max-tokens 256",
    "--n": "--n 3",
    "--quantization": "--quantization int8",
    "--json": "--json",
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "generate",
        help="answer one prompt",
        usage="%(prog)s PROMPT [options]",
        description=DESCRIPTION,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads stdin")
    add_attachment_flags(parser, "")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="use no chat template: the prompt contains the model's own placeholders",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object with all details")
    add_sampling_flags(parser, samples=True)
    add_engine_flags(parser, without=("seed",))
    parser.common = COMMON
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Generate the answer and print it."""
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    build_engine_config(arguments)  # report mistakes before torch is imported
    ask = _raw if arguments.raw else _chat
    question = ask(arguments, text)
    from sensorium.llm import LLM

    with LLM(**{"model": "demo", **engine_keywords(arguments)}) as llm:
        params = llm.get_default_sampling_params().replace(
            **{"max_tokens": None, **sampling_values(arguments)}
        )
        output = _answer(llm, question, params)
    if arguments.json:
        answer = json.dumps(_details(output), ensure_ascii=False, indent=2)
    else:
        answer = "\n".join(sample.text for sample in output.outputs)
    print(shown(answer, sys.stdout))
    return 0


def _chat(arguments: argparse.Namespace, text: str) -> list[dict[str, Any]]:
    """Return the messages of the conversation."""
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return [*system, user_message(text, arguments.attachments)]


def _raw(arguments: argparse.Namespace, text: str) -> dict[str, Any]:
    """Return a raw prompt with its images."""
    if arguments.system:
        raise ConfigError("--system needs a chat template: omit --raw.")
    prompt: dict[str, Any] = {"prompt": text}
    for modality, source in arguments.attachments:
        if modality != "image":
            raise ConfigError(f"--raw supports images only; for --{modality} omit --raw.")
        data = prompt.setdefault("multi_modal_data", {"image": []})
        data["image"].append(_opened(source))
    return prompt


def _opened(path: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(Path(path).expanduser())
        picture.load()
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"{path!r} cannot be read as a picture; --raw takes files.") from error
    return picture


def _answer(llm: LLM, question: Any, params: SamplingParams) -> RequestOutput:
    if isinstance(question, list):
        return llm.chat(question, params, use_tqdm=False)[0]
    return llm.generate(question, params, use_tqdm=False)[0]


def _details(output: RequestOutput) -> dict[str, Any]:
    times = output.metrics
    finished = times.finished_time if times is not None else None
    return {
        "outputs": [
            {
                "text": sample.text,
                "finish_reason": sample.finish_reason,
                "stop_reason": sample.stop_reason,
                "num_tokens": len(sample.token_ids),
            }
            for sample in output.outputs
        ],
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "num_item_tokens": output.num_item_tokens,
        "seconds_to_first_token": times.time_to_first_token if times is not None else None,
        "seconds": finished - times.arrival_time if times is not None and finished else None,
    }
