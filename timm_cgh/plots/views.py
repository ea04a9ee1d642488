"""Training images beside their views."""
from pathlib import Path
from typing import Sequence, Union

import numpy as np

from .style import new_figure, plot, save_figure

__all__ = ['save_views']


@plot
def save_views(rows: Sequence[Sequence[np.ndarray]], names: Sequence[str], path: Union[str, Path]) -> None:
    """Plot images, one per row, and their views.

    Args:
        rows: (H, W, C) uint8 of any size; of other than 1 and 3 channels the first is drawn
        names: of the columns
        path: PNG file to write

    Raises:
        OSError: the file cannot be written
    """
    figure = new_figure(1.5 * len(names), 1.5 * len(rows) + 0.3)
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for row, images in zip(axes, rows):
        for cell, image in zip(row, images):
            small = max(image.shape) < 100  # pixels of small images are shown as they are
            image = image if image.shape[2] == 3 else image[:, :, 0]
            cell.imshow(image, cmap='gray', vmin=0, vmax=255, interpolation='nearest' if small else 'antialiased')
            cell.set_axis_off()
    for cell, name in zip(axes[0], names):
        cell.set_title(name, fontsize=9, loc='center')
    save_figure(figure, path)
