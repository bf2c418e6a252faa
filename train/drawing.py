"""Empty matplotlib figures, and their files; matplotlib comes with the extra `plot`."""

from pathlib import Path
from typing import Any

from train.errors import UsageError


def new_figure(width: float, height: float) -> Any:
    """Make an empty matplotlib figure; sizes are in inches.

    Raises:
      UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError('pictures need matplotlib: pip install -e ".[plot]"') from None
    return Figure(figsize=(width, height), layout="constrained")


def check_picture(picture: Path) -> None:
    """Refuse a picture that `save_figure` could not write, before anything is measured; writes nothing.

    Raises:
      UsageError: matplotlib is not installed, the folder does not exist, or the format is not supported.
    """
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    kind = picture.suffix.removeprefix(".").lower()
    if kind and kind not in kinds:
        raise UsageError(f"cannot draw {picture}: {kind} is not one of {', '.join(sorted(kinds))}")
    if not picture.parent.is_dir():
        raise UsageError(f"cannot draw {picture}: {picture.parent} is not a folder")


def save_figure(figure: Any, picture: Path) -> None:
    """Write a figure in the format that the file's suffix names.

    Raises:
      UsageError: the folder does not exist, or the format is not supported.
    """
    try:
        figure.savefig(picture, dpi=130)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot draw {picture}: {error}") from None
