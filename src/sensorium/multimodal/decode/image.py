"""Pictures: encoded bytes, PIL images, arrays and tensors become (H, W, 3) uint8 RGB arrays.

The size is read from the header before anything is decoded. Orientation (EXIF) is applied,
transparency is laid over a background colour, animations give their first frame. Nothing that
Pillow says reaches a message: its texts may hold addresses.
"""

from __future__ import annotations

import importlib
import io
import math
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, features

from sensorium.config.notices import warn_caller
from sensorium.errors import InvalidRequestError, MediaTooLargeError, MediaUndecodableError
from sensorium.multimodal.decode import grey, heif, pixel_values
from sensorium.multimodal.decode.options import check_names
from sensorium.multimodal.decode.shortage import check_room, check_shortage, check_threads
from sensorium.multimodal.items import is_tensor

FORMATS: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Raster formats that are decoded; the first bytes decide, whatever a name or a content type
says."""

if features.check("avif"):
    FORMATS += ("AVIF",)

for _plugin in ("Png", "Jpeg", "WebP", "Gif", "Bmp", "Tiff", "Ppm", "Avif"):
    # Registers the format now; otherwise the first picture would make Pillow import all it knows.
    importlib.import_module(f"PIL.{_plugin}ImagePlugin")

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_DAMAGED = "The image is damaged or truncated and cannot be decoded."
_DECODING_BYTES = 8
"""Memory per pixel that every decoder needs about, the decoded image included."""

_WHITE = (255, 255, 255)

_LOAD_LOCK = threading.Lock()
"""Pillow's lazily opened files must not be loaded by two threads at once."""


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """``media_io_kwargs["image"]``.

    Attributes:
        rgba_background_color: The colour under transparent pixels, red, green and blue, 0 to 255.
        max_pixels: Images with more pixels are reduced to about so many before the model's
            processor sees them; None for no bound.
    """

    rgba_background_color: tuple[int, int, int] = _WHITE
    max_pixels: int | None = None

    @classmethod
    def parse(
        cls, options: Mapping[str, Any], param: str = "media_io_kwargs.image"
    ) -> ImageOptions:
        """Check and build.

        Raises InvalidRequestError for unknown keys, colours of anything but three integers 0–255,
        and a bound that is no positive integer.
        """
        check_names(options, list(cls.__dataclass_fields__), param)
        most = options.get("max_pixels")
        if most is not None and (type(most) is not int or most < 1):
            raise InvalidRequestError(
                f"max_pixels must be a positive integer, got {most!r:.80}.",
                param=f"{param}.max_pixels",
            )
        color = options.get("rgba_background_color", _WHITE)
        if (
            not isinstance(color, list | tuple)
            or len(color) != 3
            or not all(type(c) is int and 0 <= c <= 255 for c in color)
        ):
            raise InvalidRequestError(
                "rgba_background_color must be a list or tuple of three integers from 0 to 255, "
                f"got {color!r:.80}.",
                param=f"{param}.rgba_background_color",
            )
        return cls((color[0], color[1], color[2]), most)

    def bounded_by(self, max_pixels: int | None) -> ImageOptions:
        """Return these options with ``max_pixels``, unless they have a smaller bound."""
        bounds = [most for most in (self.max_pixels, max_pixels) if most is not None]
        return ImageOptions(self.rgba_background_color, min(bounds, default=None))


@dataclass(frozen=True, slots=True)
class _Legacy:
    content: Any

    def __post_init__(self) -> None:
        warn_caller(f"{type(self).__name__} is deprecated: use multi_modal_data={{'image': …}}")


class ImagePixelData(_Legacy):
    """Older spelling of ``{"image": picture}`` as ``multi_modal_data``.

    Takes a PIL image or a tensor (1, 3, height, width), the shape that ``image_input_shape`` names,
    of pixels as in ``multi_modal_data``: not normalised.
    """


class ImageFeatureData(_Legacy):
    """Older spelling of ``{"image": embeddings}`` as ``multi_modal_data``.

    Needs ``enable_mm_embeds``.

    Takes a tensor (1, image_feature_size, hidden size of the decoder): what the model's projector
    makes, not the features of its tower.
    """


def decode(data: bytes, options: ImageOptions, *, max_pixels: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an encoded picture.

    Raises MediaTooLargeError when the header promises more than ``max_pixels`` pixels, and
    MediaUndecodableError when the bytes are no picture of one of ``FORMATS`` or are damaged;
    MemoryError and OverloadedError when the process has no memory or no thread for it.
    """
    if not data:
        raise MediaUndecodableError("The image is empty: 0 bytes.")
    size = _webp_size(data)  # here, for Pillow makes room for such a picture when it opens it
    if size is not None:
        _check_size(*size, max_pixels)
    try:
        formats = (*FORMATS, heif.FORMAT) if heif.is_heif(data) and heif.register() else FORMATS
        with Image.open(io.BytesIO(data), formats=formats) as image:
            size = image.size
            _check_size(*size, max_pixels)
            image.load()
            return to_rgb(image, options)
    except (MediaUndecodableError, MediaTooLargeError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaTooLargeError(
            "The image has more pixels than can be decoded safely; send a smaller one."
        ) from None
    except UnidentifiedImageError:
        if heif.is_heif(data):
            check_threads()
            raise MediaUndecodableError(_DAMAGED if heif.register() else heif.MISSING) from None
        raise MediaUndecodableError(
            f"The bytes are not an image in a known format ({', '.join(FORMATS)})."
        ) from None
    except Exception as error:  # decoders raise nearly anything for damaged files
        check_shortage(error)
        # Many decoders do not tell what they lacked.
        if size is not None:
            check_room(size[0] * size[1] * _DECODING_BYTES)
        check_threads()
        raise MediaUndecodableError(_DAMAGED) from None


def decode_object(
    source: Any, options: ImageOptions, *, max_pixels: int, scale: float | None = None
) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a PIL image, numpy HWC array or torch CHW tensor.

    ``scale``: what makes 0 to 255 of floating-point values; found out from them when not given.
    Raises InvalidRequestError for other types, shapes and values, MediaTooLargeError and
    MediaUndecodableError as ``decode``.
    """
    check_picture(source)
    if isinstance(source, Image.Image):
        _check_size(*source.size, max_pixels)
        load(source)
        try:
            return to_rgb(source, options)
        except MediaUndecodableError:
            raise
        except (OSError, ValueError, TypeError, KeyError):
            raise MediaUndecodableError(
                f"The PIL image of mode {source.mode} cannot be converted to RGB."
            ) from None
    is_array = isinstance(source, np.ndarray)
    height, width = source.shape[:2] if is_array else source.shape[1:]
    _check_size(width, height, max_pixels)
    if pixel_values.is_floating(source):
        scale = pixel_values.scale_of([source]) if scale is None else scale
        values = pixel_values.to_bytes(source, scale)
    else:
        values = source if is_array else source.detach().cpu().numpy()
    if not is_array:
        values = values.transpose(1, 2, 0)
    if options.max_pixels is not None and height * width > options.max_pixels:
        small = reduced(Image.fromarray(np.ascontiguousarray(values)), options.max_pixels)
        return np.array(small, order="C")
    return np.array(values, order="C")  # a copy: what is cached must not change with the caller's


def load(image: Image.Image) -> None:
    """Read the pixels of a lazily opened PIL image, once.

    Raises MediaUndecodableError when its file is damaged.
    """
    if not isinstance(image, ImageFile.ImageFile):
        return
    with _LOAD_LOCK:
        try:
            image.load()
        except Exception:  # as in decode
            raise MediaUndecodableError(
                "The PIL image cannot be loaded: its file is closed, damaged or truncated."
            ) from None


def check_picture(source: Any) -> None:
    """Raise InvalidRequestError unless ``source`` is an image of three uint8 channels.

    A PIL image, a numpy array (H, W, 3) or a torch tensor (3, H, W).
    """
    if isinstance(source, Image.Image):
        return
    if getattr(source, "is_nested", False):
        raise InvalidRequestError("A torch image must be an ordinary dense tensor.")
    shape = tuple(getattr(source, "shape", ()))
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 and not pixel_values.is_floating(source):
            raise InvalidRequestError(
                "A numpy image must be uint8 or floating-point, with values from 0 to 255, got "
                f"{source.dtype}; scale and convert it first."
            )
        if source.ndim != 3 or shape[2] != 3:
            raise InvalidRequestError(
                f"A numpy image must have shape (height, width, 3), got {shape}."
            )
    else:
        if not is_tensor(source):
            raise InvalidRequestError(
                "An image must be a PIL.Image, a numpy array or a torch tensor, got "
                f"{type(source).__name__}."
            )
        torch = sys.modules["torch"]
        if source.layout != torch.strided or source.is_quantized or source.is_meta:
            raise InvalidRequestError("A torch image must be an ordinary dense tensor.")
        if source.dtype != torch.uint8 and not source.is_floating_point():
            raise InvalidRequestError(
                "A torch image must be uint8 or floating-point, with values from 0 to 255, got "
                f"{source.dtype}; scale and convert it first."
            )
        if source.ndim != 3 or shape[0] != 3:
            raise InvalidRequestError(
                f"A torch image must have shape (3, height, width), got {shape}."
            )
    if 0 in shape:
        raise InvalidRequestError(f"The image has no pixels: its shape is {shape}.")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a WebP header (RFC 9649, 2.5 to 2.7); None for others."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    number = int.from_bytes
    match data[12:16]:
        case b"VP8X":
            return number(data[24:27], "little") + 1, number(data[27:30], "little") + 1
        case b"VP8L":
            bits = number(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return number(data[26:28], "little") & 0x3FFF, number(data[28:30], "little") & 0x3FFF
    return None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 when there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata does not make the picture unreadable
        return 1
    return value if value in _ORIENTATIONS else 1


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise MediaUndecodableError(f"The image has no pixels: {width} x {height}.")
    if width * height > max_pixels:
        raise MediaTooLargeError(
            f"The image has {width} x {height} pixels; at most {max_pixels} pixels are allowed "
            "(--max-image-pixels)."
        )


def to_rgb(image: Image.Image, options: ImageOptions) -> np.ndarray:
    """Convert a loaded image.

    The orientation is read after loading: TIFF files turn themselves then.
    """
    turn = _ORIENTATIONS.get(orientation(image))
    if image.mode in grey.MODES:
        image = grey.scaled(image)
    elif image.mode == "F":
        raise MediaUndecodableError(
            "Floating-point images have no defined white; convert the image to 8 bits per channel."
        )
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", rgba.size, options.rgba_background_color)
        image.paste(rgba, mask=rgba.getchannel("A"))
    elif image.mode != "RGB":
        image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    return np.array(reduced(image, options.max_pixels), dtype=np.uint8, order="C")


def reduced(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """Return an image of at most ``max_pixels`` pixels and the same shape, but for rounding."""
    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (width * height))
    across, down = max(1, int(width * scale)), max(1, int(height * scale))
    size = min(across, max_pixels), min(down, max_pixels)
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
