"""What all pictures have in common; matplotlib may be absent."""
from pathlib import Path
from typing import Any, Optional, Sequence, Union

from .files import atomic_write

__all__ = ['BLUE', 'GREEN', 'GREY', 'ORANGE', 'PINK', 'count_epochs', 'new_figure', 'open_axes', 'plot_epochs',
           'save_figure', 'say_not_measured']

BLUE, ORANGE, GREEN, PINK, GREY = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#555555'  # told apart by everyone


def new_figure(width: float, height: float):
    """An empty figure in inches, or None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout='constrained')  # not pyplot: no state, no display, no leak
    FigureCanvasAgg(figure)
    return figure


def open_axes(axes, grid: Optional[str] = 'both') -> None:
    """Axes without a frame, with a light grid (`both`, `x`, `y` or None) behind what is drawn."""
    if grid:
        axes.grid(True, axis=grid, color='#dddddd', linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)


def count_epochs(axes) -> None:
    """Whole numbers along x, of a run of one epoch as well."""
    from matplotlib.ticker import MaxNLocator
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def plot_epochs(axes, epochs: Sequence[int], values: Sequence[float], **style: Any) -> None:
    """A line over epochs, with its points where they are few: a run of one epoch has a point, not a line."""
    axes.plot(epochs, values, marker='o' if len(epochs) < 16 else None, markersize=3.5, **style)


def say_not_measured(axes) -> None:
    """In the middle of axes that have nothing to show."""
    axes.text(0.5, 0.5, 'not measured', transform=axes.transAxes, ha='center', va='center', color=GREY)


def save_figure(figure, path: Union[str, Path]) -> bool:
    """A whole PNG file or none.

    Raises:
        OSError: the file cannot be written
    """
    with atomic_write(path, 'wb') as file:
        figure.savefig(file, format='png', dpi=120)
    return True
