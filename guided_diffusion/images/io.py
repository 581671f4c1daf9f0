"""Reading, cropping and scaling images."""

from __future__ import annotations

import io
import logging
import math
import os
import random
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import BinaryIO

import blobfile as bf
import numpy as np
from PIL import Image, UnidentifiedImageError, features

from ..errors import UserError
from ..system.files import LFS_POINTER, is_remote

# Formats with a signature, so that other bytes are not mistaken for an image, and their usual extensions.
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
}
_OPTIONAL = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}  # features that a build of Pillow may lack
_BUILT = features.get_supported()
FORMATS = tuple(name for name in _FORMATS if name not in _OPTIONAL or _OPTIONAL[name] in _BUILT)
EXTENSIONS = tuple(extension for name in FORMATS for extension in _FORMATS[name])

# Pillow's warnings are about files that it can read. The filter is global because `warnings.catch_warnings` is not
# thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # the exception has the same message


class UnreadableImage(UserError):
    """An image file that is missing, truncated, or not an image. The message gives its path and the reason."""


Check = Callable[[BinaryIO], None]  # inspects an open file, such as `inputs.Inputs.note`


def read_image(path: str, image_size: int, check: Check | None = None) -> np.ndarray:
    """Read the central square of an image file, local or remote: uint8 (image_size, image_size, 3), RGB.

    `check` is called with the open file before decoding. Raises UnreadableImage, and the exceptions of `check`.
    """
    return center_crop_arr(open_image(path, check, image_size), image_size)


def open_image(path: str, check: Check | None = None, crop_side: int | None = None) -> Image.Image:
    """Read an image file, local or remote, as an upright RGB image on white.

    With `crop_side`, the image is for a crop that reduces its short side to at most this. To save memory, a very large
    image is then halved as the crop would do it, which does not change the pixels of the crop.

    `check` is called with the open file before decoding. Raises UnreadableImage, and the exceptions of `check`.
    """
    try:
        on_disk = not is_remote(path) and os.path.getsize(path) > LARGE_FILE
        file = open(path, "rb") if on_disk else io.BytesIO(read_bytes(path))  # noqa: SIM115
    except Exception as error:  # depends on the storage
        raise UnreadableImage(f"image {path!r} cannot be read: {reason_of(error)}") from error
    with file:
        if check is not None:
            check(file)
            file.seek(0)
        return _decode(path, file, crop_side)


def _decode(path: str, file: BinaryIO, crop_side: int | None) -> Image.Image:
    try:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError("it is a Git LFS pointer, not the image: fetch it with git lfs pull")
        file.seek(0)
        with Image.open(file, formats=FORMATS) as image:
            if crop_side:
                _check_scaled(image, crop_side)
            raw_mode = str(image.tile[0][3]) if image.tile else ""
            image.load()
            file.close()  # frees memory
            if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
                raise ValueError("it has 32 bits per channel, of unknown range; expected 8 or 16")
            _match_transparency(image, raw_mode)
            turn = _turn_of(image)
            if crop_side and math.prod(image.size) > LARGE and min(image.size) >= 2 * crop_side:
                return _halved_rgb(image, turn)
            return _to_rgb(image if turn is None else image.transpose(turn))
    except Exception as error:  # depends on the decoder
        raise UnreadableImage(f"image {path!r} cannot be read: {reason_of(error)}") from error


def _check_scaled(image: Image.Image, short_side: int) -> None:
    """Raise ValueError if an image is so elongated that scaling its short side takes too much memory."""
    pixels = short_side**2 * max(image.size) // min(image.size)
    most = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
    if pixels > most:
        raise ValueError(
            f"it has {image.width}x{image.height} pixels, and would have {pixels:,} with a short side of "
            f"{short_side}: at most {most:,} are possible. Crop it"
        )


LARGE = 2**25  # pixels beyond which copies of an image take too much memory
LARGE_FILE = 2**24  # bytes beyond which a file is not read into memory
STRIP = 2**22  # pixels of a large image that are converted together


def read_bytes(path: str) -> bytes:
    """The content of a file, local or remote."""
    if is_remote(path):
        return bf.read_bytes(path)
    with open(path, "rb") as f:
        return f.read()


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, for a message."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is not one of {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """The operation that makes an image upright, by its EXIF orientation; None if there is nothing to do."""
    try:
        return _TURNS.get(image.getexif().get(0x0112))
    except Exception:
        return None


def _match_transparency(image: Image.Image, raw_mode: str) -> None:
    """Convert a PNG's transparent colour, which Pillow leaves in the file's bit depth, to that of the pixels.

    As 16-bit colours become 8-bit, colours that differ only in the last bits become transparent too.
    """
    transparent = image.info.get("transparency")
    if raw_mode in ("L;2", "L;4") and isinstance(transparent, int):
        highest = 2 ** int(raw_mode[2:]) - 1
        if transparent <= highest:
            image.info["transparency"] = transparent * 255 // highest
    elif raw_mode == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB, on white."""
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits (Pillow would clip it), on white."""
    values = np.asarray(image)
    grey = ((values.astype(np.int32).clip(0, 65535) + 128) // 257).astype(np.uint8)  # value / 257, rounded
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _halved_rgb(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """An image upright, in RGB, halved as in `_resize_short_side`; channel by channel to save memory."""
    if image.getbands()[0] in ("1", "L", "I"):  # grey
        return Image.merge("RGB", [_half(_channel(image, 0, turn))] * 3)
    return Image.merge("RGB", [_half(_channel(image, number, turn)) for number in range(3)])


def _channel(image: Image.Image, number: int, turn: Image.Transpose | None) -> Image.Image:
    """Red, green or blue (0, 1, 2) of an image, upright; strip by strip to save memory."""
    width, height = image.size
    channel = Image.new("L", image.size)
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        channel.paste(_to_rgb(strip).getchannel(number), (0, top))
    return channel if turn is None else channel.transpose(turn)


MIN_CROP_FRAC = 0.8  # default of random crops


def center_crop_arr(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """The central square of an image, resized to (image_size, image_size, channels) as in the training of ADM (Dhariwal
    and Nichol, arXiv:2105.05233).
    """
    pil_image = _resize_short_side(pil_image, image_size)
    left, top = ((side - image_size) // 2 for side in pil_image.size)
    return np.array(pil_image.crop((left, top, left + image_size, top + image_size)))


def random_crop_arr(
    pil_image: Image.Image,
    image_size: int,
    min_crop_frac: float = MIN_CROP_FRAC,
    max_crop_frac: float = 1.0,
    rng: random.Random | ModuleType = random,
) -> np.ndarray:
    """A random square of an image, resized to (image_size, image_size, channels).

    The side of the square is between `min_crop_frac` and `max_crop_frac` times the image's short side.
    """
    short_side = rng.randint(math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac))
    pil_image = _resize_short_side(pil_image, short_side)
    left, top = (rng.randint(0, side - image_size) for side in pil_image.size)
    return np.array(pil_image.crop((left, top, left + image_size, top + image_size)))


def _resize_short_side(pil_image: Image.Image, short_side: int) -> Image.Image:
    # Halving with a box filter first is fast and averages over every pixel.
    while min(pil_image.size) >= 2 * short_side:
        pil_image = _half(pil_image)
    scale = short_side / min(pil_image.size)
    return pil_image.resize(tuple(round(side * scale) for side in pil_image.size), Image.Resampling.BICUBIC)


def _half(image: Image.Image) -> Image.Image:
    return image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)


def to_float(image: np.ndarray) -> np.ndarray:
    """Convert uint8 to float32 in [-1, 1]."""
    return image.astype(np.float32) / 127.5 - 1
