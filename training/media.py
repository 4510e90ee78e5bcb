"""Images, videos and sounds as parts of chat messages, for measuring through the engine."""

from __future__ import annotations

import base64
import io
import wave
from typing import Any

import numpy as np
from PIL import Image

from training.speech import RATE

Part = dict[str, Any]
#: Frames per second of encoded videos.
FPS = 4


def picture_part(picture: Image.Image) -> Part:
    """An image as it is."""
    return {"type": "image_pil", "image_pil": picture}


def clip_part(frames: list[Image.Image]) -> Part:
    """Frames as a Matroska file that loses nothing, in a URL."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "bgr0"
        for picture in frames:
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return {"type": "video_url", "video_url": {"url": _url("video/x-matroska", file.getvalue())}}


def wave_file(samples: Any) -> bytes:
    """A WAV file of samples from -1 to 1 at 16 kHz, 16 bits each."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(np.round(np.asarray(samples) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def sound_part(samples: Any) -> Part:
    """Samples as a WAV file in base64."""
    data = base64.b64encode(wave_file(samples)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
