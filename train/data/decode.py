"""Decode images of any size and mode to uniform uint8 arrays."""

import io
import struct

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Exceptions of Pillow for files that are not images, are truncated or corrupted, or claim to be enormous.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def decode_image(data: bytes, size: int | None, channels: int, *, rng: np.random.Generator | None = None) -> np.ndarray:
    """Decode JPEG, PNG, WebP ... of any size and mode to uint8 [size, size, channels] (the image's if None).

    The short side is resized to `size` and the centre cropped; with `rng` a random box of 8-100 % of the area and an
    aspect of 3/4-4/3 is cropped instead (https://arxiv.org/abs/1409.4842). The EXIF orientation is applied.
    """
    with Image.open(io.BytesIO(data)) as file:
        if size is not None and rng is None:
            file.draft(None, (size, size))  # JPEG can decode directly at 1/2, 1/4 ... if that is large enough
        image = to_mode(ImageOps.exif_transpose(file), "L" if channels == 1 else "RGB")
        if size is not None:
            width, height = image.size
            box = _centre(width, height) if rng is None else random_box(width, height, rng)
            if image.size != (size, size) or rng is not None:
                image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(image)
    return pixels[..., None] if channels == 1 else pixels


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert any Pillow mode to 8-bit grey or RGB: 16-bit values are scaled, transparency becomes black."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, np.float64)
        # In a 16-bit mode small values mean a dark image; the wider modes may also hold 8-bit values.
        scale = 257.0 if image.mode.startswith("I;16") or np.max(pixels, initial=0) > 255 else 1.0
        image = Image.fromarray(np.clip(np.rint(pixels / scale), 0, 255).astype(np.uint8))
    if image.mode in ("P", "PA", "LA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert(mode)


def _centre(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Draw (left, top, right, bottom) of a box with 8-100 % of the area and an aspect of 3/4-4/3, as in torchvision."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return _centre(width, height)


def fault(error: Exception) -> str:
    """The reason why an image cannot be read; Pillow's own message names a Python object."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
