"""Images offline: one, a batch, several in one prompt, frames of a video, and chat.

python examples/images_offline.py EXAMPLE [MODEL]
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable

from PIL import Image

from sensorium import LLM, RequestOutput, SamplingParams
from sensorium.assets.image import ImageAsset
from sensorium.assets.video import VideoAsset

LLAVA = "llava-hf/llava-1.5-7b-hf"
SHORT = SamplingParams(temperature=0, max_tokens=64)


def one_image(model: str = LLAVA) -> list[RequestOutput]:
    """Pass one image, with the model's own placeholder in the prompt."""
    llm = LLM(model=model)
    prompt = "USER: <image>\nWhat is the content of this image?\nASSISTANT:"
    image = ImageAsset("cherry_blossom").pil_image
    return llm.generate({"prompt": prompt, "multi_modal_data": {"image": image}}, SHORT)


def batch(model: str = LLAVA) -> list[RequestOutput]:
    """Run several prompts together, each with its image."""
    llm = LLM(model=model)
    questions = {
        "cherry_blossom": "What colour are the flowers?",
        "stop_sign": "What does the sign say?",
    }
    return llm.generate(
        [
            {
                "prompt": f"USER: <image>\n{question}\nASSISTANT:",
                "multi_modal_data": {"image": ImageAsset(name).pil_image},
            }
            for name, question in questions.items()
        ],
        SHORT,
    )


def several_images(model: str = "microsoft/Phi-3.5-vision-instruct") -> list[RequestOutput]:
    """Pass two images in one prompt."""
    llm = LLM(model=model, max_model_len=4096, limit_mm_per_prompt={"image": 2})
    prompt = (
        "<|user|>\n<|image_1|>\n<|image_2|>\nWhat is the content of each image?<|end|>\n"
        "<|assistant|>\n"
    )
    images = [ImageAsset("stop_sign").pil_image, ImageAsset("cherry_blossom").pil_image]
    return llm.generate({"prompt": prompt, "multi_modal_data": {"image": images}}, SHORT)


def frames_as_images(model: str = "Qwen/Qwen2-VL-2B-Instruct") -> list[RequestOutput]:
    """Pass the frames of a video as separate images in a chat message."""
    llm = LLM(model=model, limit_mm_per_prompt={"image": 4})
    question = "Describe this set of frames. Consider the frames to be a part of the same video."
    content: list[dict[str, object]] = [{"type": "text", "text": question}]
    content += [
        {"type": "image_url", "image_url": {"url": data_url(frame)}}
        for frame in VideoAsset("baby_reading", num_frames=4).pil_images
    ]
    return llm.chat([{"role": "user", "content": content}], SHORT)


def chat(model: str = LLAVA) -> list[RequestOutput]:
    """Pass conversations with images as URLs and as PIL images."""
    llm = LLM(model=model)
    sources: list[dict[str, object]] = [
        {"type": "image_url", "image_url": {"url": ImageAsset("stop_sign").url}},
        {"type": "image_pil", "image_pil": ImageAsset("cherry_blossom").pil_image},
    ]
    return llm.chat(
        [
            [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "Hello!"},
                {"role": "assistant", "content": "Hello! How can I help you today?"},
                {
                    "role": "user",
                    "content": [source, {"type": "text", "text": "What is in this image?"}],
                },
            ]
            for source in sources
        ],
        SHORT,
    )


def background_color(model: str = LLAVA) -> list[RequestOutput]:
    """Blend transparent pixels with black instead of white."""
    options = {"image": {"rgba_background_color": [0, 0, 0]}}
    llm = LLM(model=model, media_io_kwargs=options)
    image = Image.new("RGBA", (200, 100), (255, 0, 0, 128))
    prompt = "USER: <image>\nWhich colour is this?\nASSISTANT:"
    return llm.generate({"prompt": prompt, "multi_modal_data": {"image": image}}, SHORT)


def data_url(image: Image.Image) -> str:
    """Return an image as a ``data:`` URL."""
    file = io.BytesIO()
    image.save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


EXAMPLES: dict[str, Callable[..., list[RequestOutput]]] = {
    function.__name__: function
    for function in (one_image, batch, several_images, frames_as_images, chat, background_color)
}

if __name__ == "__main__":
    for output in EXAMPLES[sys.argv[1]](*sys.argv[2:3]):
        print(output.outputs[0].text)
