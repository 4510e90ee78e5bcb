"""All kinds of input through OpenAI's client; the server's model must support them.

python examples/openai_media.py EXAMPLE [BASE_URL]
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable
from typing import Any

import torch
from openai import OpenAI
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from sensorium.assets.audio import AudioAsset
from sensorium.assets.image import ImageAsset
from sensorium.assets.video import VideoAsset

HERE = "http://127.0.0.1:8000/v1"


def one_image(base_url: str = HERE) -> ChatCompletion:
    """Send an image as a data: URL; an https: URL would be fetched by the server."""
    return ask(base_url, "What is in this image?", image_part("stop_sign"))


def several_images(base_url: str = HERE) -> ChatCompletion:
    """Send several images in one message."""
    parts = [image_part("stop_sign"), image_part("cherry_blossom")]
    return ask(base_url, "What do these images have in common?", *parts)


def cached_image(base_url: str = HERE) -> ChatCompletion:
    """Send an image with an id of your own; the second request sends only the id."""
    ask(base_url, "What is in this image?", {**image_part("stop_sign"), "uuid": "sku-1234"})
    cached = {"type": "image_url", "image_url": None, "uuid": "sku-1234"}
    return ask(base_url, "Which colour is it?", cached)


def video(base_url: str = HERE) -> ChatCompletion:
    """Send a video as a data: URL, of which four frames are sampled."""
    part = {"type": "video_url", "video_url": {"url": VideoAsset("baby_reading").data_url}}
    options = {"media_io_kwargs": {"video": {"num_frames": 4}}}
    return ask(base_url, "What happens in this video?", part, **options)


def audio_data(base_url: str = HERE) -> ChatCompletion:
    """Send audio as base64 data."""
    data = base64.b64encode(AudioAsset("winning_call").path.read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "ogg"}}
    return ask(base_url, "What is in this audio?", part)


def audio_url(base_url: str = HERE) -> ChatCompletion:
    """Send audio as a data: URL; an https: URL would be fetched by the server."""
    part = {"type": "audio_url", "audio_url": {"url": AudioAsset("winning_call").data_url}}
    return ask(base_url, "What is in this audio?", part)


def image_embeds(base_url: str, embeds: torch.Tensor) -> ChatCompletion:
    """Send embeddings instead of an image, to a server with --enable-mm-embeds."""
    file = io.BytesIO()
    torch.save(embeds, file)
    data = base64.b64encode(file.getvalue()).decode()
    return ask(base_url, "What is in this image?", {"type": "image_embeds", "image_embeds": data})


def embedding(base_url: str = HERE) -> CreateEmbeddingResponse:
    """Return the embedding of an image and a text, from a server with --runner pooling."""
    client = OpenAI(base_url=base_url, api_key="none")
    content = [image_part("stop_sign"), {"type": "text", "text": "What is shown in this image?"}]
    return client.post(
        "/embeddings",
        cast_to=CreateEmbeddingResponse,
        body={
            "model": client.models.list().data[0].id,
            "messages": [{"role": "user", "content": content}],
            "encoding_format": "float",
        },
    )


def ask(base_url: str, question: str, *parts: Any, **extra: Any) -> ChatCompletion:
    """Send a message of parts and a question; ``extra`` are fields beyond OpenAI's own."""
    client = OpenAI(base_url=base_url, api_key="none")
    content: Any = [*parts, {"type": "text", "text": question}]
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],
        max_completion_tokens=64,
        temperature=0,
        extra_body=extra,
    )


def image_part(name: str) -> dict[str, Any]:
    """Return an image of the package as a content part."""
    return {"type": "image_url", "image_url": {"url": ImageAsset(name).data_url}}


EXAMPLES: dict[str, Callable[[str], ChatCompletion]] = {
    function.__name__: function
    for function in (one_image, several_images, cached_image, video, audio_data, audio_url)
}

if __name__ == "__main__":
    answer = EXAMPLES[sys.argv[1]](*sys.argv[2:3] or [HERE])
    print(answer.choices[0].message.content)
