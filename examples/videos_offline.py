"""Videos offline: as an array, a tensor with metadata, a list of images, and in chat.

python examples/videos_offline.py EXAMPLE [MODEL]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from sensorium import LLM, RequestOutput, SamplingParams
from sensorium.assets.video import VideoAsset

QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"
PROMPT = (
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
    "What happens in this video?<|im_end|>\n<|im_start|>assistant\n"
)
SHORT = SamplingParams(temperature=0, max_tokens=64)
NUM_FRAMES = 8


def array(model: str = QWEN) -> list[RequestOutput]:
    """Pass frames as a numpy array (T, H, W, 3)."""
    frames = VideoAsset("baby_reading", num_frames=NUM_FRAMES).np_ndarrays
    return LLM(model=model).generate(
        {"prompt": PROMPT, "multi_modal_data": {"video": frames}}, SHORT
    )


def tensor_with_metadata(model: str = QWEN) -> list[RequestOutput]:
    """Pass frames as a tensor (T, 3, H, W), and their positions in the video."""
    asset = VideoAsset("baby_reading", num_frames=NUM_FRAMES)
    frames = torch.from_numpy(asset.np_ndarrays).permute(0, 3, 1, 2)
    video = (frames, asset.metadata)
    return LLM(model=model).generate(
        {"prompt": PROMPT, "multi_modal_data": {"video": video}}, SHORT
    )


def images(model: str = QWEN) -> list[RequestOutput]:
    """Pass frames as a list of images."""
    frames = VideoAsset("baby_reading", num_frames=NUM_FRAMES).pil_images
    return LLM(model=model).generate(
        {"prompt": PROMPT, "multi_modal_data": {"video": frames}}, SHORT
    )


def chat(model: str = QWEN) -> list[RequestOutput]:
    """Pass a file by its URL, of which eight frames are sampled."""
    llm = LLM(model=model, media_io_kwargs={"video": {"num_frames": NUM_FRAMES}})
    content = [
        {"type": "video_url", "video_url": {"url": VideoAsset("baby_reading").url}},
        {"type": "text", "text": "What happens in this video?"},
    ]
    return llm.chat([{"role": "user", "content": content}], SHORT)


EXAMPLES: dict[str, Callable[..., list[RequestOutput]]] = {
    function.__name__: function for function in (array, tensor_with_metadata, images, chat)
}

if __name__ == "__main__":
    for output in EXAMPLES[sys.argv[1]](*sys.argv[2:3]):
        print(output.outputs[0].text)
