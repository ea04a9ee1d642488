"""Training curves: of one run, and of several runs in one plot."""
import math
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

from timm_cgh.errors import InputError
from timm_cgh.plots.style import (
    BLUE, COLORS, GREEN, GREY, ORANGE, PINK, label_epochs, new_figure, plot, plot_epochs, read_column, save_figure)

__all__ = ['save_curves', 'save_runs']

# One run: panel -> title, unit, column of summary.csv -> (legend, colour, line width).
# The parts of the loss are named after the student's context, then the teacher's (Eq. 6).
_PANELS = {
    'loss': ('Loss and its parts', 'nats', {
        'train_loss': ('total', GREY, 2.2),
        'train_loss_gh': ('global → hypercolumn', BLUE, 1.4),
        'train_loss_hg': ('hypercolumn → global', ORANGE, 1.4),
        'train_loss_gg': ('global → global', BLUE, 1.4),
        'train_loss_hh': ('hypercolumn → hypercolumn', ORANGE, 1.4),
        'train_loss_nce': ('InfoNCE (warm-up)', PINK, 1.4),
    }),
    'knn': ('Accuracy of nearest neighbours', 'top-1, %', {
        'eval_knn': ('kNN', GREEN, 1.8),
        'eval_one_shot': ('one labelled image per class', PINK, 1.4),
    }),
    'rankme': ('RankMe: effective rank of the features', '', {'eval_rankme': ('', GREEN, 1.8)}),
    'lr': ('Learning rate', '', {'lr': ('', GREY, 1.8)}),
    'entropy': ('Entropy of the target', 'nats', {
        'train_entropy_global': ('global', BLUE, 1.6),
        'train_entropy_hyper': ('hypercolumn', ORANGE, 1.6),
    }),
    'std': ('Standard deviation of the embeddings (0: collapsed)', '', {
        'train_std_global': ('global', BLUE, 1.6),
        'train_std_hyper': ('hypercolumn', ORANGE, 1.6),
    }),
    'alignment': ('Alignment of two views (lower: more invariant)', '', {'eval_alignment': ('', GREEN, 1.8)}),
    'uniformity': ('Uniformity (lower: more spread out)', '', {'eval_uniformity': ('', GREEN, 1.8)}),
}
# Several runs: title, unit, columns; the second column is dashed
_SHARED_PANELS = (
    ('kNN accuracy', 'top-1, %', ('eval_knn',)),
    ('Loss', 'nats', ('train_loss',)),
    ('Entropy of the target (dashed: hypercolumn)', 'nats', ('train_entropy_global', 'train_entropy_hyper')),
    ('Standard deviation of the embeddings (dashed: hypercolumn)', '', ('train_std_global', 'train_std_hyper')),
)


@plot
def save_curves(
        rows: Sequence[Mapping[str, Any]],
        path: Union[str, Path],
        title: str = '',
        knn_levels: Optional[Mapping[str, float]] = None,
) -> None:
    """Plot a run over its epochs: one panel for the loss and its parts, one for each measure that was taken.

    Args:
        rows: rows of `summary.csv`, see `read_column`
        path: PNG file to write
        title: heading
        knn_levels: name -> top-1 in percent, drawn as horizontal lines (the backbone before training, the raw pixels)

    Raises:
        OSError: the file cannot be written
    """
    measured = {name: panel for name, panel in _PANELS.items() if any(read_column(rows, c)[0] for c in panel[2])}
    width = max(2, math.ceil(len(measured) / 2))
    figure = new_figure(0.6 + 4.4 * width, 6.6)
    grid = figure.subplots(2, width, sharex=True)
    panels = dict(zip(measured, grid.flat))
    for axes in grid.flat[len(measured):]:
        axes.set_visible(False)
    for name, (heading, unit, columns) in measured.items():
        for column, (label, color, line_width) in columns.items():
            plot_epochs(panels[name], *read_column(rows, column), label=label, color=color, linewidth=line_width)
        label_epochs(panels[name], heading, unit)
    for upper, lower in zip(*grid):
        if not lower.get_visible():
            upper.set_xlabel('epochs completed')
            upper.tick_params(labelbottom=True)
    if 'knn' in panels:
        for (label, level), style in zip((knn_levels or {}).items(), ('dashed', 'dotted', 'dashdot', (0, (5, 1)))):
            panels['knn'].axhline(level, color=GREY, linewidth=1.2, linestyle=style, label=label)
    for name, axes in panels.items():
        if len(axes.get_lines()) > 1:
            axes.legend(title='student context → target' if name == 'loss' else None)
    if 'std' in panels:
        panels['std'].set_ylim(0, 1.05)
    if 'lr' in panels:
        panels['lr'].ticklabel_format(axis='y', style='sci', scilimits=(-2, 4))
    save_figure(figure, path, title)


@plot
def save_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Union[str, Path], title: str = '') -> None:
    """Plot several runs (name -> rows, see `save_curves`) over one another: kNN accuracy, loss, entropy and spread.

    Raises:
        InputError: more runs than colours
        OSError: the file cannot be written
    """
    from matplotlib.lines import Line2D
    if len(runs) > len(COLORS):
        raise InputError(f'runs: {len(runs)} runs, at most {len(COLORS)} fit into one plot')
    figure = new_figure(10.5, 6.6)
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (heading, unit, columns) in zip(panels.flat, _SHARED_PANELS):
        for rows, color in zip(runs.values(), COLORS):
            for column, style in zip(columns, ('solid', 'dashed')):
                plot_epochs(axes, *read_column(rows, column), color=color, linestyle=style)
        label_epochs(axes, heading, unit)
    panels[1, 1].set_ylim(0, 1.05)
    handles = [Line2D([], [], color=color) for _, color in zip(runs, COLORS)]
    legend_rows = math.ceil(len(runs) / 4)
    figure.legend(handles, runs, loc='outside lower center', ncols=math.ceil(len(runs) / legend_rows), fontsize=9)
    save_figure(figure, path, title)
