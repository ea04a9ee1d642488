"""Pictures of a run."""
import math
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from timm_cgh.files import atomic_write

__all__ = ['save_curves']

_BLUE, _ORANGE, _GREEN, _PINK, _GREY = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#555555'

# column of summary.csv -> legend, colour, line width; parts are named student context, then teacher context (Eq. 6)
_LOSSES = {
    'train_loss': ('total, as trained', _GREY, 2.2),
    'train_loss_gh': ('global → hypercolumn', _BLUE, 1.4),
    'train_loss_hg': ('hypercolumn → global', _ORANGE, 1.4),
    'train_loss_gg': ('global → global', _BLUE, 1.4),
    'train_loss_hh': ('hypercolumn → hypercolumn', _ORANGE, 1.4),
    'train_loss_nce': ('InfoNCE (warm-up)', _PINK, 1.4),
}
_RATES = {'lr': ('', _GREY, 1.8)}
_KNN = {'eval_knn': ('student', _GREEN, 1.8)}
_ENTROPIES = {'train_entropy_global': ('global', _BLUE, 1.6), 'train_entropy_hyper': ('hypercolumn', _ORANGE, 1.6)}
_SPREADS = {'train_std_global': ('global', _BLUE, 1.6), 'train_std_hyper': ('hypercolumn', _ORANGE, 1.6)}


def _curve(rows: Sequence[Mapping[str, Any]], column: str) -> Tuple[List[float], List[float]]:
    """Epochs that were over (1, 2, ...) and values, where the column has a finite one."""
    epochs, values = [], []
    for row in rows:
        if row.get(column) in (None, ''):
            continue
        value = float(row[column])  # text where a resumed run read its earlier rows from the file
        if math.isfinite(value):
            epochs.append(int(row['epoch']) + 1)
            values.append(value)
    return epochs, values


def _draw(axes, rows: Sequence[Mapping[str, Any]], columns: Dict[str, tuple], title: str, ylabel: str = '') -> None:
    drawn = 0
    for column, (label, color, width) in columns.items():
        epochs, values = _curve(rows, column)
        if epochs:
            marker = 'o' if len(epochs) < 16 else None  # a run of one epoch has a point, not a line
            axes.plot(epochs, values, label=label, color=color, linewidth=width, marker=marker, markersize=3.5)
            drawn += 1
    axes.set_title(title, fontsize=10, loc='left')
    axes.set_ylabel(ylabel)
    axes.grid(True, color='#dddddd', linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    if not drawn:
        axes.text(0.5, 0.5, 'not measured', transform=axes.transAxes, ha='center', va='center', color=_GREY)


def save_curves(
        rows: Sequence[Mapping[str, Any]],
        path: Union[str, Path],
        title: str = '',
        knn_levels: Optional[Mapping[str, float]] = None,
) -> bool:
    """Draw a run over its epochs: loss parts, learning rate, kNN accuracy, diagnostics; a whole PNG file or none.

    Args:
        rows: rows of `summary.csv`, `epoch` counted from 0; columns may be absent, values blank, text or not finite
        path: PNG file to write
        title: heading
        knn_levels: name -> top-1 in percent, drawn as horizontal lines (the untrained backbone, the raw pixels)

    Returns:
        False, and nothing is written, where matplotlib is not installed

    Raises:
        OSError: the file cannot be written
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False

    figure = Figure(figsize=(10.5, 6.6), layout='constrained')  # not pyplot: no state, no display, no leak
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2)
    diagnostics = grid[1, 1].subgridspec(2, 1)
    losses, rates, knn = (figure.add_subplot(grid[cell]) for cell in ((0, 0), (0, 1), (1, 0)))
    entropy, spread = figure.add_subplot(diagnostics[0]), figure.add_subplot(diagnostics[1])

    _draw(losses, rows, _LOSSES, 'Loss and its parts', 'nats')
    _draw(rates, rows, _RATES, 'Learning rate')
    _draw(knn, rows, _KNN, 'kNN accuracy', 'top-1, %')
    _draw(entropy, rows, _ENTROPIES, 'Entropy of the target', 'nats')
    _draw(spread, rows, _SPREADS, 'Standard deviation of the embeddings (0: collapsed)')
    for (name, level), style in zip((knn_levels or {}).items(), ('--', ':', '-.', (0, (5, 1)))):
        knn.axhline(level, color=_GREY, linewidth=1.2, linestyle=style, label=name)

    ends = [int(row['epoch']) + 1 for row in rows]
    for axes in (losses, rates, knn, entropy, spread):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        if len(set(ends)) > 1:
            margin = 0.02 * (max(ends) - min(ends))
            axes.set_xlim(min(ends) - margin, max(ends) + margin)  # the same in all panels, whatever is blank where
        if len(axes.get_lines()) > 1:
            heading = 'student context → target' if axes is losses else None
            axes.legend(fontsize=8, frameon=False, title=heading, title_fontsize=8)
    rates.ticklabel_format(axis='y', style='sci', scilimits=(-2, 4))
    spread.set_ylim(0, 1.05)
    for axes in (knn, spread):
        axes.set_xlabel('epochs done')
    if title:
        figure.suptitle(title, fontsize=12)
    with atomic_write(path, 'wb') as file:
        figure.savefig(file, format='png', dpi=120)
    return True
