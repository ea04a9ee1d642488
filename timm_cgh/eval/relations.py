"""Recall and precision of the teacher's positives along training: the picture and the comparison of Fig. 2 (Sec. 4.6).

    python train.py --track-relations ...                                      # measures a run, in either context
    python -m timm_cgh.eval.relations RUN_CGH RUN_RESSL --out fig2.png         # draws the paper's comparison

The paper's two curves come from two runs: CGH's hypercolumn relation and ReSSL's (`--context global`) global one.
"""
import csv
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import yaml

from timm_cgh.arguments import Parser
from timm_cgh.errors import InputError, blame
from timm_cgh.figure import (
    BLUE, GREEN, GREY, ORANGE, PINK, count_epochs, new_figure, open_axes, plot_epochs, save_figure, say_not_measured)
from timm_cgh.summary import read_rows

from .positives import (
    RelationCounts, RelationTracker, Selection, count_relations, relation_columns, selection_text)

__all__ = [
    'RelationCounts', 'RelationCurve', 'RelationTracker', 'Selection', 'TrackedRun', 'count_relations', 'draw',
    'read_run', 'relation_columns', 'relation_curve', 'save_relations', 'selection_text',
]

_COLORS = (ORANGE, BLUE, GREEN, PINK)
_CONTEXT_NAMES = {'hyper': 'hypercolumn', 'global': 'global'}


class RelationCurve(NamedTuple):
    """One line in either panel: (epochs that were over, percent)."""
    label: str
    recall: Tuple[List[int], List[float]]
    precision: Tuple[List[int], List[float]]


def relation_curve(rows: Sequence[Mapping[str, Any]], context: str, label: str = '') -> RelationCurve:
    """Rows of `summary.csv` (numbers or text, blanks left out) -> the curve of a context, `hyper` or `global`."""
    points = {}
    for kind in ('recall', 'precision'):
        values = [(int(row['epoch']) + 1, row.get(f'train_{kind}_{context}')) for row in rows]
        values = [(epoch, float(value)) for epoch, value in values if value not in (None, '')]
        points[kind] = [epoch for epoch, _ in values], [value for _, value in values]
    return RelationCurve(label or _CONTEXT_NAMES[context], **points)


def save_relations(
        curves: Sequence[RelationCurve],
        path: Union[str, Path],
        selection: Selection,
        bank_sizes: Sequence[Optional[int]] = (),
        title: str = '',
) -> bool:
    """Draw recall and precision over the epochs in two panels, with the threshold in words; a whole PNG file or none.

    Args:
        curves: at most four
        path: PNG file to write
        selection: the threshold that all curves were measured with
        bank_sizes: K of the runs, where known
        title: heading

    Returns:
        False, and nothing is written, where matplotlib is not installed

    Raises:
        OSError: the file cannot be written
    """
    figure = new_figure(10.5, 4.4)
    if figure is None:
        return False
    for axes, kind in zip(figure.subplots(1, 2, sharex=True), ('recall', 'precision')):
        for curve, color in zip(curves, _COLORS):
            epochs, values = getattr(curve, kind)
            plot_epochs(axes, epochs, values, label=curve.label, color=color, linewidth=1.8)
        if not any(getattr(curve, kind)[0] for curve in curves):
            say_not_measured(axes)
        axes.set_title(kind.capitalize(), fontsize=11, loc='left')
        axes.set_xlabel('epochs done')
        axes.set_ylabel(f'{kind}, %')
        axes.set_ylim(bottom=0)
        count_epochs(axes)
        open_axes(axes)
        if curves:
            axes.legend(fontsize=9, frameon=False)
    sizes = ' and '.join(str(size) for size in dict.fromkeys(bank_sizes) if size is not None)
    figure.supxlabel(
        f"selected: {selection.describe()}{f' (K = {sizes})' if sizes else ''}; true: of the image's class",
        fontsize=9,
        color=GREY,
    )
    if title:
        figure.suptitle(title, fontsize=12)
    return save_figure(figure, path)


class TrackedRun(NamedTuple):
    """What a run folder tells: rows of `summary.csv`, `args.yaml`, and the threshold it was measured with."""
    rows: List[Dict[str, str]]
    args: Dict[str, Any]
    selection: Selection


def read_run(folder: Union[str, Path], context: str, flag: str = 'RUN') -> TrackedRun:
    """Read a run of `train.py --track-relations`.

    Args:
        folder: the run's, with `summary.csv` and `args.yaml`
        context: the relation that is wanted, `hyper` or `global`
        flag: what errors call the folder

    Raises:
        InputError: no run, or one that did not measure this relation
    """
    where = f'{flag} {folder}'
    for name in ('summary.csv', 'args.yaml'):
        if not os.path.isfile(os.path.join(folder, name)):
            raise InputError(f'{where}: no folder of a run, it holds no {name}')
    try:
        with open(os.path.join(folder, 'args.yaml'), encoding='utf-8') as file:
            args = yaml.safe_load(file)
        rows = read_rows(os.path.join(folder, 'summary.csv'))
        if not isinstance(args, dict):
            raise ValueError('args.yaml holds no options')
        curve = relation_curve(rows, context)
    except (KeyError, OSError, TypeError, ValueError, csv.Error, yaml.YAMLError) as error:
        reason = f'no column {error}' if isinstance(error, KeyError) else ' '.join(str(error).split())
        raise InputError(f'{where}: not as train.py writes it ({reason})') from error
    if not args.get('track_relations') or not curve.recall[0]:
        raise InputError(
            f'{where}: has no train_recall_{context} in its summary.csv; train it with --track-relations on labelled '
            f'images{" and --context cross" if context == "hyper" else ""}')
    with blame(f'{where}: track_relations', args['track_relations']):
        selection = Selection.parse(str(args['track_relations']))
    return TrackedRun(rows, args, selection)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = Parser(
        prog='python -m timm_cgh.eval.relations',
        description="Fig. 2: recall and precision of the teacher's positives, CGH's hypercolumn against ReSSL's global "
                    'relation',
    )
    parser.add_argument('cgh', metavar='RUN_CGH', help='folder of a run of train.py --track-relations')
    parser.add_argument('ressl', metavar='RUN_RESSL', help='the same with --context global')
    parser.add_argument('--out', metavar='FILE', default='fig2.png', help='PNG file to write')
    args = parser.parse_args(argv)
    try:
        draw(args.cgh, args.ressl, args.out)
    except InputError as error:
        parser.error(str(error))
    print(args.out)
    return 0


def draw(cgh: str, ressl: str, out: str) -> None:
    """The comparison of Fig. 2 from two run folders.

    Raises:
        InputError: runs that cannot be compared, a file that cannot be written, no matplotlib
    """
    if not out.lower().endswith('.png'):
        raise InputError(f'--out {out}: must end in .png')
    runs = read_run(cgh, 'hyper', 'RUN_CGH'), read_run(ressl, 'global', 'RUN_RESSL')
    for run, flag, folder, context, method in zip(
            runs, ('RUN_CGH', 'RUN_RESSL'), (cgh, ressl), ('cross', 'global'), ('CGH', 'ReSSL')):
        if run.args.get('context') != context:
            raise InputError(
                f"{flag} {folder}: was trained with --context {run.args.get('context')}, but {method} is --context "
                f'{context}')
    selections = [run.selection for run in runs]
    if selections[0] != selections[1]:
        raise InputError(
            f'RUN_RESSL {ressl}: measured with the threshold {selections[1]}, RUN_CGH with {selections[0]}; take runs '
            f'of one --track-relations')
    curves = [
        relation_curve(runs[0].rows, 'hyper', 'CGH, hypercolumn relation'),
        relation_curve(runs[1].rows, 'global', 'ReSSL, global relation'),
    ]
    sizes = [run.args.get('bank_size') for run in runs]
    with blame('--out', out):
        drawn = save_relations(curves, out, selections[0], sizes, "Positives that the teacher's relations select")
    if not drawn:
        raise InputError(f'--out {out}: needs matplotlib (pip install matplotlib)')


if __name__ == '__main__':
    sys.exit(main())
