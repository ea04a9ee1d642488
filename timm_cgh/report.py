"""Pictures of a run, and of several over one another.

    python -m timm_cgh.report output/train/a output/train/b --out curves.png
"""
import math
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from timm_cgh.arguments import Parser
from timm_cgh.errors import InputError, blame
from timm_cgh.figure import (
    BLUE, GREEN, GREY, ORANGE, PINK, count_epochs, new_figure, open_axes, plot_epochs, save_figure, say_not_measured)
from timm_cgh.summary import read_rows

__all__ = ['save_curves', 'save_runs']

# column of summary.csv -> legend, colour, line width; parts are named student context, then teacher context (Eq. 6)
_LOSSES = {
    'train_loss': ('total, as trained', GREY, 2.2),
    'train_loss_gh': ('global → hypercolumn', BLUE, 1.4),
    'train_loss_hg': ('hypercolumn → global', ORANGE, 1.4),
    'train_loss_gg': ('global → global', BLUE, 1.4),
    'train_loss_hh': ('hypercolumn → hypercolumn', ORANGE, 1.4),
    'train_loss_nce': ('InfoNCE (warm-up)', PINK, 1.4),
}
_RATES = {'lr': ('', GREY, 1.8)}
_KNN = {'eval_knn': ('student', GREEN, 1.8)}
_ENTROPIES = {'train_entropy_global': ('global', BLUE, 1.6), 'train_entropy_hyper': ('hypercolumn', ORANGE, 1.6)}
_SPREADS = {'train_std_global': ('global', BLUE, 1.6), 'train_std_hyper': ('hypercolumn', ORANGE, 1.6)}
# of several runs: title, unit, columns; a second column is dashed
_PANELS = (
    ('kNN accuracy', 'top-1, %', ('eval_knn',)),
    ('Loss, as trained', 'nats', ('train_loss',)),
    ('Entropy of the target (dashed: hypercolumn)', 'nats', ('train_entropy_global', 'train_entropy_hyper')),
    ('Standard deviation of the embeddings (dashed: hypercolumn)', '', ('train_std_global', 'train_std_hyper')),
)
_RUN_COLORS = (ORANGE, BLUE, GREEN, PINK, GREY, '#e69f00', '#56b4e9', '#000000')


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


def _label(axes, title: str, ylabel: str = '') -> None:
    axes.set_title(title, fontsize=10, loc='left')
    axes.set_ylabel(ylabel)
    open_axes(axes)
    if not axes.get_lines():
        say_not_measured(axes)


def _plot(axes, rows: Sequence[Mapping[str, Any]], column: str, **style: Any) -> None:
    epochs, values = _curve(rows, column)
    if epochs:
        plot_epochs(axes, epochs, values, **style)


def _draw(axes, rows: Sequence[Mapping[str, Any]], columns: Dict[str, tuple], title: str, ylabel: str = '') -> None:
    for column, (label, color, width) in columns.items():
        _plot(axes, rows, column, label=label, color=color, linewidth=width)
    _label(axes, title, ylabel)


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
    figure = new_figure(10.5, 6.6)
    if figure is None:
        return False
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
        knn.axhline(level, color=GREY, linewidth=1.2, linestyle=style, label=name)

    ends = [int(row['epoch']) + 1 for row in rows]
    for axes in (losses, rates, knn, entropy, spread):
        count_epochs(axes)
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
    return save_figure(figure, path)


def save_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Union[str, Path], title: str = '') -> bool:
    """Draw several runs over one another: kNN accuracy, loss, diagnostics; a whole PNG file or none.

    Args:
        runs: name -> rows, at most eight; for rows, path and title see `save_curves`

    Returns:
        False, and nothing is written, where matplotlib is not installed

    Raises:
        InputError: more runs than there are colours that can be told apart; values that are no numbers
        OSError: the file cannot be written
    """
    if len(runs) > len(_RUN_COLORS):
        raise InputError(f'RUN: {len(runs)} runs, at most {len(_RUN_COLORS)} can be told apart')
    figure = new_figure(10.5, 6.6)
    if figure is None:
        return False
    from matplotlib.lines import Line2D
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (heading, unit, columns) in zip(panels.flat, _PANELS):
        for (name, rows), color in zip(runs.items(), _RUN_COLORS):
            with blame('RUN', name):
                for column, style in zip(columns, ('-', '--')):
                    _plot(axes, rows, column, color=color, linewidth=1.6, linestyle=style)
        _label(axes, heading, unit)
        count_epochs(axes)
    panels[1, 1].set_ylim(0, 1.05)
    for axes in panels[1]:
        axes.set_xlabel('epochs done')
    lines = [Line2D([], [], color=color, linewidth=1.6) for _, color in zip(runs, _RUN_COLORS)]
    columns = math.ceil(len(runs) / math.ceil(len(runs) / 4))
    figure.legend(lines, list(runs), loc='outside lower center', ncols=columns, fontsize=9, frameon=False)
    if title:
        figure.suptitle(title, fontsize=12)
    return save_figure(figure, path)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parser.parse_args(argv)
    names = args.names or [os.path.basename(os.path.abspath(folder)) for folder in args.runs]
    if len(names) != len(args.runs):
        raise InputError(f"--names {' '.join(names)}: {len(names)} names for {len(args.runs)} runs")
    if len(set(names)) != len(names):
        raise InputError(f"RUN {' '.join(args.runs)}: two of one name; tell them apart with --names")
    runs = {}
    for name, folder in zip(names, args.runs):
        with blame('RUN', folder):
            runs[name] = read_rows(os.path.join(folder, 'summary.csv'))
            if not runs[name]:
                raise ValueError('no folder of a run, it holds no summary.csv with an epoch in it')
    if not args.out.lower().endswith('.png'):
        raise InputError(f'--out {args.out}: must end in .png')
    with blame('--out', args.out):
        if not save_runs(runs, args.out, args.title):
            raise ImportError('needs matplotlib (pip install matplotlib)')
    print(args.out)
    return 0


parser = Parser(prog='python -m timm_cgh.report', description='Runs of train.py over one another, epoch by epoch')
parser.add_argument('runs', metavar='RUN', nargs='+', help='folder with a summary.csv')
parser.add_argument('--names', metavar='NAME', nargs='+', help="of the runs, default their folders'")
parser.add_argument('--title', default='')
parser.add_argument('--out', metavar='FILE', default='curves.png', help='PNG file to write')

if __name__ == '__main__':
    sys.exit(parser.run(main))
