"""Heat maps as images: enlarged to the size of the images, scaled to [0, 1], laid out in a grid."""

import jax


def upsample(maps: jax.Array, size: tuple[int, int], *, align_corners: bool = False) -> jax.Array:
    """Enlarge maps [B, h, w] to float32 [B, *size] bilinearly, as OpenCV and PyTorch do."""
    raise NotImplementedError


def rescale(maps: jax.Array) -> jax.Array:
    """Scale each map [B, ...] to [0, 1] by its minimum and maximum."""
    raise NotImplementedError


def grid(tiles: jax.Array, columns: int | None = None, *, gap: int = 1, fill: float = 1.0) -> jax.Array:
    """Lay out tiles [N, h, w] or [N, h, w, C] in rows as one picture [H, W] or [H, W, C]; square by default."""
    raise NotImplementedError
