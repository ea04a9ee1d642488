"""Training images beside their views."""
from pathlib import Path
from typing import Mapping, Sequence, Union

import numpy as np

from .style import draw_image, new_figure, plot, save_figure

__all__ = ['save_views']


@plot
def save_views(rows: Mapping[str, Sequence[np.ndarray]], path: Union[str, Path]) -> None:
    """Plot images, and below each its views.

    Args:
        rows: name -> (H, W, C) uint8 images; of other than 1 and 3 channels the first is drawn
        path: PNG file to write

    Raises:
        OSError: the file cannot be written
    """
    columns = max(map(len, rows.values()))
    figure = new_figure(1.5 * columns + 0.3, 1.5 * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, images) in zip(axes, rows.items()):
        row[0].set_ylabel(name)
        for cell, image in zip(row, images):
            draw_image(cell, image if image.shape[2] == 3 else image[:, :, 0])
            cell.spines[:].set_visible(False)
    save_figure(figure, path)
