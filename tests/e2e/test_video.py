"""Videos from a caller's hand to tokens.

Offline and served, whole and cut up, equal to the reference.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.config import MediaConfig
from sensorium.errors import ConfigError, MediaTooLargeError
from sensorium.models import loader
from sensorium.multimodal.decode.video import loading as video
from sensorium.multimodal.items import Decoded, Video
from tests import checkpoints
from tests.e2e.serving import Server
from tests.models.harness import Harness, text_ids
from tests.models.videos import NUM_TOKENS, VideoReference, clip
from tests.multimodal.clips import make_clip
from tests.multimodal.support import data_url, encoded

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
LIMITS = {"max_model_len": 600, "num_kv_blocks": 200, "block_size": 8}
FRAMES = {"video": {"num_frames": 6}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("allowed") / "clip.mp4"
    path.write_bytes(make_clip("mp4", 30))
    return path


@pytest.fixture(scope="module")
def expect(folder: Path) -> Any:
    """The reference's tokens for a text with decoded media."""
    harness = Harness(loader.load(str(folder), device="cpu"))
    reference = VideoReference(folder)

    def tokens(text: str, media: list[Decoded]) -> list[int]:
        return reference.run(harness.add(text_ids(folder, text), media), media)[1]

    return tokens


@pytest.fixture(
    scope="module",
    params=[{}, {"max_num_batched_tokens": 7, "enable_prefix_caching": False}],
    ids=["whole", "cut up"],
)
def llm(request: pytest.FixtureRequest, folder: Path, file: Path) -> Iterator[LLM]:
    options = {**LIMITS, **request.param, "allowed_local_media_path": str(file.parent)}
    with LLM(str(folder), enable_mm_embeds=True, media_io_kwargs=FRAMES, **options) as llm:
        yield llm


def given(own: Video) -> tuple[np.ndarray, dict[str, Any]]:
    """A clip as a caller has it."""
    metadata = {"fps": own.fps, "total_num_frames": own.num_source_frames}
    return own.frames, metadata | {"frames_indices": list(own.indices)}


def tokens_of(llm: LLM, prompts: Any) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]


def test_arrays_lists_and_tensors(llm: LLM, expect: Any) -> None:
    first, second = clip(5, 60, 90, 24.0), clip(4, 90, 61, 10.0)
    still = first.frames[0]
    text = f"What {VIDEO}happens here?"
    mixed = f"{IMAGE}Before {VIDEO} and {VIDEO}?"
    frames, metadata = given(first)
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(frame) for frame in frames]
    prompts: list[dict[str, Any]] = [
        {"prompt": text, "multi_modal_data": {"video": source}}
        for source in ((frames, metadata), (tensor, metadata), (pictures, metadata))
    ]
    both = {"image": Image.fromarray(still), "video": [given(first), given(second)]}
    prompts.append({"prompt": mixed, "multi_modal_data": both})
    expected = [expect(text, [first])] * 3 + [expect(mixed, [still, first, second])]
    assert tokens_of(llm, prompts) == expected
    decoded = llm.stats().media["decode_count"]
    assert tokens_of(llm, prompts) == expected
    assert llm.stats().media["decode_count"] == decoded, "what was seen is not decoded again"
    assert llm.stats().kv_blocks_used == 0


def test_a_file_in_a_chat(llm: LLM, expect: Any, file: Path) -> None:
    own = video.decode(file.read_bytes(), video.VideoOptions(6), MediaConfig(), None)
    expected = expect(CHAT.format(f"What {VIDEO}happens?"), [own])
    for part in (
        {"type": "video_url", "video_url": {"url": f"file://{file}"}},
        {"type": "video", "video": str(file)},
        {"type": "video_url", "video_url": {"url": data_url(file.read_bytes(), "video/mp4")}},
    ):
        content = [
            {"type": "text", "text": "What "},
            part,
            {"type": "text", "text": "happens?"},
        ]
        (out,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
        assert out.outputs[0].token_ids == expected


def test_embeddings_stand_for_videos(llm: LLM, folder: Path, expect: Any) -> None:
    own, text = [clip(5, 60, 90, 24.0), clip(2, 84, 30, 10.0)], f"{VIDEO} and {VIDEO}"
    seq = Harness(loader.load(str(folder), device="cpu")).add(text_ids(folder, text), own)
    metas = [item.features.meta for item in seq.items]
    source = {
        "video_embeds": torch.cat(seq.embeds),
        "video_grid_thw": torch.tensor([meta["grid"] for meta in metas]),
        "second_per_grid_ts": torch.tensor([meta["second_per_grid"] for meta in metas]),
    }
    lists = source | {
        "video_grid_thw": [list(meta["grid"]) for meta in metas],
        "second_per_grid_ts": [meta["second_per_grid"] for meta in metas],
    }
    expected = expect(text, own)
    for given_source in (source, lists):
        prompt = {"prompt": text, "multi_modal_data": {"video": given_source}}
        assert tokens_of(llm, prompt) == [expected]


def test_limits(folder: Path) -> None:
    limits = {"video": {"count": 1, "num_frames": 3}, "image": 0}
    frames = clip(4, 56, 56).frames
    with LLM(str(folder), limit_mm_per_prompt=limits, **LIMITS) as llm:
        with pytest.raises(MediaTooLargeError, match="--limit-mm-per-prompt"):
            llm.generate({"prompt": VIDEO, "multi_modal_data": {"video": frames}}, use_tqdm=False)
        prompt = {"prompt": VIDEO, "multi_modal_data": {"video": frames[:3]}}
        (out,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert len(out.outputs[0].token_ids) == NUM_TOKENS


@pytest.mark.parametrize(
    "options", [{"video": {"num_frames": 0}}, {"video": {"fps": "fast"}}, {"vido": {}}]
)
def test_wrong_options_fail_at_start(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    for model in (folder, checkpoints.make_text("qwen2", tmp_path)):
        with pytest.raises(ConfigError, match=r"media_io_kwargs|num_frames|fps"):
            LLM(str(model), media_io_kwargs=options, **LIMITS)


@pytest.mark.slow
def test_a_server(folder: Path, file: Path, expect: Any, tmp_path: Path) -> None:
    own = video.decode(file.read_bytes(), video.VideoOptions(6), MediaConfig(), None)
    expected = expect(CHAT.format(f"{VIDEO}What happens?"), [own])
    flags = [
        *("--num-kv-blocks", "200", "--block-size", "8", "--max-model-len", "600"),
        *("--allowed-local-media-path", str(file.parent)),
        *("--media-io-kwargs", '{"video": {"num_frames": 6}}'),
    ]
    server = Server(str(folder), tmp_path / "log", flags)
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            def ask(url: str) -> Any:
                content = [
                    {"type": "video_url", "video_url": {"url": url}},
                    {"type": "text", "text": "What happens?"},
                ]
                return client.chat.completions.create(
                    model=client.models.list().data[0].id,
                    messages=[{"role": "user", "content": content}],  # type: ignore[misc,list-item]
                    max_tokens=NUM_TOKENS,
                    temperature=0,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )

            for url in (f"file://{file}", data_url(file.read_bytes(), "video/mp4")):
                answer = ask(url)
                assert answer.choices[0].token_ids == expected
            pictures = [encoded(Image.fromarray(frame), "PNG") for frame in own.frames]
            parts = ",".join(base64.b64encode(picture).decode() for picture in pictures)
            plain = Video(own.frames, tuple(range(6)), 6)
            answer = ask(f"data:video/jpeg;base64,{parts}")
            assert answer.choices[0].token_ids == expect(
                CHAT.format(f"{VIDEO}What happens?"), [plain]
            )
            with pytest.raises(openai.BadRequestError, match="damaged") as caught:
                ask(data_url(file.read_bytes()[:2000], "video/mp4"))
            assert caught.value.code == "media_undecodable"
    finally:
        assert server.stop() == 0
