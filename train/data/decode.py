"""Decode images of any size and mode to uniform uint8 arrays."""

import io
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from train.errors import UsageError

Record = tuple[bytes | str, int]  # an encoded image, or the reason why it cannot be read, and its label
Size = int | tuple[int, int] | None  # side of a square, (height, width), or None for the image's own

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""


class Unreadable(ValueError):
    """An image that cannot be decoded; the message says why."""


def fault(error: Exception, data: bytes = b"") -> str:
    """The reason why an image, of which `data` is the beginning, cannot be read.

    Pillow's own messages may name a Python object, or nothing.
    """
    if data.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the image: fetch it with git lfs pull"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more pixels than Pillow reads safely, {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million: shrink it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def silence_pillow() -> None:
    """Keep Pillow from warning of large images and odd metadata; what it cannot read is reported by name anyway."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_image(data: bytes, size: Size, channels: int, *, rng: np.random.Generator | None = None) -> np.ndarray:
    """Decode JPEG, PNG, WebP ... of any size and mode to uint8 [height, width, channels]; of several frames, the first.

    The image is resized and its centre cropped to `size`; with `rng` a random box of 8-100 % of the area and an
    aspect of 3/4-4/3 is cropped instead (https://arxiv.org/abs/1409.4842). The EXIF orientation is applied.

    Raises:
      Unreadable: not an image, or a damaged one.
    """
    # Pillow's readers raise exceptions of any type for malformed files.
    try:
        with Image.open(io.BytesIO(data)) as file:
            if size is not None and rng is None:
                side = size if isinstance(size, int) else max(size)
                file.draft(None, (side, side))  # JPEG can decode directly at 1/2, 1/4 ... if that is large enough
            return to_pixels(file, size, channels, rng)
    except Exception as error:
        raise Unreadable(fault(error, data)) from None


def decode_many(records: Sequence[Record], size: int | None, channels: int) -> list[tuple[np.ndarray | str, int]]:
    """Decode (encoded image, label) pairs, also in a process of its own: a reason instead of unreadable pixels."""
    silence_pillow()
    return [(_decoded(data, size, channels), label) for data, label in records]


def _decoded(data: bytes | str, size: int | None, channels: int) -> np.ndarray | str:
    try:
        return data if isinstance(data, str) else decode_image(data, size, channels)
    except Unreadable as error:
        return fault(error)


def to_pixels(image: Image.Image, size: Size, channels: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Turn, convert, resize and crop a Pillow image to uint8 [height, width, channels]; see `decode_image`."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    image = to_mode(upright(image), "L" if channels == 1 else "RGB")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        box = centre_box(*image.size, width / height) if rng is None else random_box(*image.size, rng)
        if image.size != (width, height) or rng is not None:
            image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image)
    return pixels[..., None] if channels == 1 else pixels


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of a Pillow image."""
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 if the Exif block is malformed, which does not damage the pixels."""
    # Without the test of `info`, `getexif` decodes a whole PNG. TIFF turns itself.
    if not {"exif", "Raw profile type exif", "xmp"} & image.info.keys() or image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as for the image itself
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert any Pillow mode to 8-bit grey or RGB: deep values are scaled, transparency becomes black.

    An image that black would hide, such as a black drawing without a background, is put on white.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(to_8_bits(np.asarray(image)))
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    if image.mode in ("P", "PA", "LA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        on_black = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        alpha, brightness = np.asarray(image.getchannel("A")), np.asarray(on_black.convert("L"))
        hidden = np.min(alpha, initial=255) == 0 < np.max(alpha, initial=0) and np.max(brightness, initial=0) < 16
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image) if hidden else on_black
    return image if image.mode == mode else image.convert(mode)  # `convert` would copy it


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale integers of 16 or 32 bits, or floats, to uint8, by the range that an image's values suggest.

    Integers up to 255, and floats that are not fractions, have 8 bits; 16-bit integers up to 4095 have 12. Floats in
    [0, 1] are fractions. The range from the smallest to the largest value is stretched if there are values below 0 or
    above 65535, or fractions of which all are too small to be seen. What is not finite is 0.
    """
    pixels = np.where(np.isfinite(values), values, 0).astype(np.float64)
    low, high = float(np.min(pixels, initial=0)), float(np.max(pixels, initial=0))
    unseen = 0 < high < 1 / 255
    if values.dtype.kind == "f" and low >= 0 and (high <= 1 or (high <= 2 and np.any(pixels % 1))):
        top = max(high, 1.0)  # resampling may exceed 1
    else:
        top = 255.0 if high <= 255 else 4095.0 if high <= 4095 else 65535.0
    if low < 0 or high > 65535 or unseen:
        pixels, top = pixels - low, high - low
    return np.rint(pixels * (255 / top)).astype(np.uint8)


def centre_box(width: int, height: int, aspect: float = 1.0) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred box with this ratio of width to height."""
    w, h = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Draw (left, top, right, bottom) of a box with 8-100 % of the area and an aspect of 3/4-4/3, as in torchvision."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return centre_box(width, height)


def any_to_pixels(image: Any, shape: tuple[int | None, int | None, int]) -> np.ndarray:
    """Bring an image to uint8 of this shape (H, W, C); where H and W are None, it keeps its size.

    `image` is a path, encoded bytes, an open file, a Pillow image, or uint8 [H, W] or [H, W, C] with values 0 to 255.

    Raises:
      Unreadable: it cannot be read or decoded, or it is an array of a different kind.
    """
    height, width, channels = shape
    size = None if height is None or width is None else (height, width)
    if isinstance(image, str | os.PathLike):
        try:
            image = Path(image).expanduser().read_bytes()
        except (OSError, ValueError, RuntimeError) as error:
            raise Unreadable(fault(error)) from None
    elif hasattr(image, "read") and not isinstance(image, Image.Image):
        image = image.read()
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_image(bytes(image), size, channels)
    if not isinstance(image, Image.Image):
        array = image_array(image)
        if array.shape == tuple(shape):
            return array
        image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    try:
        return to_pixels(image, size, channels)
    except Exception as error:  # Pillow images load lazily, so they may turn out to be damaged
        raise Unreadable(fault(error)) from None


def read_pixels(image: Any, shape: tuple[int | None, int | None, int], name: str = "") -> np.ndarray:
    """Bring an image that a user passes to uint8, see `any_to_pixels`.

    Raises:
      UsageError: it cannot be read; the message has its path, or without one its `name`.
    """
    try:
        return any_to_pixels(image, shape)
    except Unreadable as error:
        name = str(image) if isinstance(image, str | os.PathLike) else name
        raise UsageError(f"cannot read image{name and f' {name}'}: {error}") from None


def is_many(images: Any) -> bool:
    """Whether `images` are several images, such as a list or an array of paths, instead of one."""
    if isinstance(images, np.ndarray):
        return images.ndim == 1 and images.dtype.kind in "UO"
    one = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
    single = isinstance(images, one) or any(hasattr(images, name) for name in ("read", "__array__"))
    return isinstance(images, Iterable) and not single


def image_array(image: Any) -> np.ndarray:
    """Check that an array is an image, and return it as uint8 [H, W, C] with 1 to 4 channels.

    Raises:
      Unreadable: it is not; the message says how to convert it.
    """
    try:
        array = np.asarray(image)
    except Exception as error:  # arrays of other libraries, nested lists of uneven lengths
        raise Unreadable(f"it does not convert to an array: {fault(error)}") from None
    what = f"an image array must be uint8 [H, W, C], not {array.dtype} {array.shape}"
    if array.dtype != np.uint8:
        floats = array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1
        raise Unreadable(f"{what}{': multiply by 255 and round, then .astype(np.uint8)' if floats else ''}")
    if array.ndim == 2:
        array = array[..., None]
    if channels_first(array.shape):
        raise Unreadable(f"{what}: move the channels last, np.moveaxis(image, 0, -1)")
    if array.ndim != 3 or not 1 <= array.shape[2] <= 4 or not array.size:
        raise Unreadable(f"{what}{': pass several images as a list, list(images)' if array.ndim == 4 else ''}")
    return array


def channels_first(shape: tuple[int, ...]) -> bool:
    """Whether (.., C, H, W) is the likely order of an image's axes, instead of (.., H, W, C)."""
    return len(shape) >= 3 and shape[-3] in (1, 3, 4) and shape[-1] > 4
