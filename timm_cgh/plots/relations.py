"""Recall and precision of the teacher's positives along training (Fig. 2, Sec. 4.6).

The paper's two curves come from two runs: CGH's hypercolumn relation (`context=cross`) and ReSSL's global one
(`context=global`), each trained with `track_relations`.
"""
import os
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from timm_cgh.errors import InputError, checking
from timm_cgh.files import read_resolved, read_rows, read_yaml
from timm_cgh.plots.style import COLORS, GREY, label_epochs, new_figure, plot, plot_epochs, read_column, save_figure
from timm_cgh.task.positives import Selection

__all__ = ['RelationCurve', 'TrackedRun', 'read_tracked_run', 'relation_curve', 'save_relations']

_RELATION_NAMES = {'hyper': 'hypercolumn', 'global': 'global'}


class RelationCurve(NamedTuple):
    """One line in each panel: (numbers of completed epochs, percent)."""
    label: str
    recall: Tuple[List[int], List[float]]
    precision: Tuple[List[int], List[float]]


def relation_curve(rows: Sequence[Mapping[str, Any]], relation: str, label: str = '') -> RelationCurve:
    """Curve of a relation, `hyper` or `global`, from rows of `summary.csv` (see `read_column`)."""
    recall, precision = (read_column(rows, f'train_{kind}_{relation}') for kind in ('recall', 'precision'))
    return RelationCurve(label or _RELATION_NAMES[relation], recall, precision)


@plot
def save_relations(
        curves: Sequence[RelationCurve],
        path: Union[str, Path],
        selection: Selection,
        bank_sizes: Sequence[Optional[int]] = (),
        title: str = '',
) -> None:
    """Plot recall and precision over the epochs in two panels, with the threshold in words.

    Args:
        curves: at most eight
        path: PNG file to write
        selection: threshold that all curves were measured with
        bank_sizes: K of the runs, None where unknown
        title: heading

    Raises:
        OSError: the file cannot be written
    """
    figure = new_figure(10.5, 4.4)
    for axes, kind in zip(figure.subplots(1, 2, sharex=True), ('recall', 'precision')):
        for curve, color in zip(curves, COLORS):
            plot_epochs(axes, *getattr(curve, kind), label=curve.label, color=color, linewidth=1.8)
        label_epochs(axes, kind.capitalize(), f'{kind}, %')
        axes.set_ylim(bottom=0)
        if axes.get_lines():
            axes.legend(fontsize=9)
    sizes = ' and '.join(str(size) for size in dict.fromkeys(bank_sizes) if size is not None)
    figure.supxlabel(
        f"selected: {selection.describe()}{f' (K = {sizes})' if sizes else ''}; true: of the image's class",
        fontsize=9,
        color=GREY,
    )
    save_figure(figure, path, title)


class TrackedRun(NamedTuple):
    """What Fig. 2 needs of a run: its curve, the threshold it was measured with, and the size K of its banks."""
    curve: RelationCurve
    selection: Selection
    bank_size: Optional[int]


def read_tracked_run(folder: Union[str, Path], context: str, label: str = '', parameter: str = 'folder') -> TrackedRun:
    """Read the folder of a run that was trained with `track_relations`.

    Args:
        folder: the run's, with `summary.csv`, `args.yaml` and, for a default bank size, `resolved.yaml`
        context: context that it must have been trained in: `cross` for the hypercolumn relation, `global`
        label: of the curve
        parameter: name of the folder in errors

    Raises:
        InputError: not a run, a run in another context, or one that did not measure the relation
    """
    relation = 'hyper' if context == 'cross' else context
    at_fault = f'{parameter}={folder}'
    args = read_yaml(Path(folder, 'args.yaml'))
    curve = relation_curve(read_rows(os.path.join(folder, 'summary.csv')), relation, label)
    if args.get('context') != context:
        raise InputError(f"{at_fault}: trained with context {args.get('context')}, must be {context}")
    if not args.get('track_relations') or not curve.recall[0]:
        raise InputError(
            f'{at_fault}: its summary.csv has no train_recall_{relation}; train it with track_relations on labelled '
            f'images')
    with checking(f"{os.path.join(folder, 'args.yaml')}: track_relations", args['track_relations'], ValueError):
        selection = Selection.parse(str(args['track_relations']))
    bank_size = args.get('bank_size')
    if bank_size is None and Path(folder, 'resolved.yaml').exists():  # the default one
        bank_size = read_resolved(folder)['options'].get('bank_size')
    return TrackedRun(curve, selection, bank_size)
