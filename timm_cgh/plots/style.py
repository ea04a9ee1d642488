"""Style and building blocks shared by all plots."""
import functools
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, ParamSpec, Sequence, Tuple, Union

import numpy as np

from timm_cgh.files import atomic_write

__all__ = [
    'BLUE', 'COLORS', 'GREEN', 'GREY', 'ORANGE', 'PINK', 'draw_image', 'label_epochs', 'new_figure', 'plot',
    'plot_epochs', 'read_column', 'save_figure']

P = ParamSpec('P')

# Okabe and Ito's palette: distinguishable with any colour vision
COLORS = ORANGE, BLUE, GREEN, PINK, GREY, *_ = (
    '#d55e00', '#0072b2', '#009e73', '#cc79a7', '#555555', '#e69f00', '#56b4e9', '#000000')
_STYLE: Dict[Any, Any] = {
    'axes.axisbelow': True,
    'axes.grid': True,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'axes.titlelocation': 'left',
    'axes.titlesize': 10,
    'axes.xmargin': 0.02,
    'figure.dpi': 120,
    'figure.titlesize': 12,
    'grid.color': '#dddddd',
    'grid.linewidth': 0.6,
    'legend.fontsize': 8,
    'legend.frameon': False,
    'legend.title_fontsize': 8,
    'lines.linewidth': 1.6,
    'lines.markersize': 3.5,
    'text.parse_math': False,  # a class name may hold dollar signs
}


def plot(save: Callable[P, None]) -> Callable[P, bool]:
    """Decorator of functions that draw and write a plot: applies the style.

    The decorated function returns whether it wrote the file: without matplotlib it does nothing and returns False.
    """
    @functools.wraps(save)
    def save_styled(*args: P.args, **kwargs: P.kwargs) -> bool:
        try:
            import matplotlib.figure
        except ImportError:
            return False
        with matplotlib.rc_context(_STYLE):
            save(*args, **kwargs)
        return True
    return save_styled


def new_figure(width: float, height: float):
    """Empty figure of a size in inches."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout='constrained')  # not pyplot: no global state, no display, no leak


def save_figure(figure, path: Union[str, Path], title: str = '') -> None:
    """Write a PNG file in one rename.

    Raises:
        OSError: the file cannot be written
    """
    if title:
        figure.suptitle(title)
    with atomic_write(path, 'wb') as file:
        figure.savefig(file, format='png')


def read_column(rows: Sequence[Mapping[str, Any]], column: str) -> Tuple[List[int], List[float]]:
    """Numbers of completed epochs (from 1) and the column's values, from the rows that have a finite one.

    Args:
        rows: rows of `summary.csv` with `epoch` counted from 0; values are numbers, text, blank or absent
        column: name of the column
    """
    points = [(int(row['epoch']) + 1, float(row[column])) for row in rows if row.get(column) not in (None, '')]
    points = [(epoch, value) for epoch, value in points if math.isfinite(value)]
    return [epoch for epoch, _ in points], [value for _, value in points]


def plot_epochs(axes, epochs: Sequence[int], values: Sequence[float], **style: Any) -> None:
    """Draw a line over epochs, with markers where the points are few: a single point has no line."""
    if epochs:
        axes.plot(epochs, values, marker='o' if len(epochs) < 16 else None, **style)


def draw_image(axes, image: np.ndarray) -> None:
    """Draw an (H, W) or (H, W, 3) uint8 image without ticks; pixels of small ones are shown as they are."""
    small = max(image.shape[:2]) < 100
    axes.imshow(image, cmap='gray', vmin=0, vmax=255, interpolation='nearest' if small else 'antialiased')
    axes.set(xticks=[], yticks=[])


def label_epochs(axes, title: str, ylabel: str) -> None:
    """Title and labels of axes whose x are epochs, once their lines are drawn; 'not measured' where there are none."""
    axes.set(title=title, ylabel=ylabel)
    axes.locator_params('x', nbins=10, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    if axes.get_subplotspec().is_last_row():
        axes.set_xlabel('epochs completed')
    if not axes.get_lines():
        axes.text(0.5, 0.5, 'not measured', transform=axes.transAxes, ha='center', va='center', color=GREY)
