"""Methods side by side: what each run came to, as tables and as a chart."""
import csv
import os
import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Union

from timm_cgh.figure import BLUE, GREY, ORANGE, new_figure, open_axes, save_figure
from timm_cgh.files import atomic_write

__all__ = ['Run', 'save_chart', 'save_tables', 'summarise']


class Run(NamedTuple):
    """One method, one seed: top-1 in percent, images per second and MiB of the training."""
    method: str
    seed: int
    knn: float
    linear: float
    images_per_s: Optional[float] = None
    peak_memory_mib: Optional[float] = None
    command: str = ''


_FIGURES = ('knn', 'linear', 'images_per_s', 'peak_memory_mib')


def summarise(runs: Sequence[Run]) -> List[Dict[str, Any]]:
    """Runs -> a row for each method in the order of their first runs: means, and deviations over the seeds.

    Returns:
        `method`, `seeds` and, per figure, its mean and `<figure>_std` (of a sample; None of one seed); None where no
        run has the figure
    """
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        mine = [run for run in runs if run.method == method]
        row: Dict[str, Any] = dict(method=method, seeds=len(mine))
        for name in _FIGURES:
            values = [getattr(run, name) for run in mine if getattr(run, name) is not None]
            row[name] = statistics.fmean(values) if values else None
            row[f'{name}_std'] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def _cell(row: Dict[str, Any], name: str, digits: int) -> str:
    if row[name] is None:
        return ''
    deviation = row[f'{name}_std']
    return f'{row[name]:.{digits}f}' + ('' if deviation is None else f' ± {deviation:.{digits}f}')


def _markdown(rows: Sequence[Dict[str, Any]]) -> str:
    lines = ['| method | seeds | kNN top-1, % | linear top-1, % | images/s | peak memory, MiB |', '|---|--:|--:|--:|--:|--:|']
    for row in rows:
        cells = [row['method'], str(row['seeds'])]
        cells += [_cell(row, name, digits) for name, digits in zip(_FIGURES, (2, 2, 0, 0))]
        lines.append(f"| {' | '.join(cells)} |")
    return '\n'.join(lines) + '\n'


def save_tables(rows: Sequence[Dict[str, Any]], runs: Sequence[Run], folder: Union[str, Path]) -> None:
    """Write `compare.csv` and `compare.md` (a row for each method) and `runs.csv` (a row for each run).

    Args:
        rows: of `summarise`
        runs: what they summarise
        folder: where to write
    """
    for name, records in (('compare.csv', rows), ('runs.csv', [run._asdict() for run in runs])):
        with atomic_write(os.path.join(folder, name)) as file:
            writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator='\n')
            writer.writeheader()
            writer.writerows(
                {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()} for record in records)
    with atomic_write(os.path.join(folder, 'compare.md')) as file:
        file.write(_markdown(rows))


def save_chart(rows: Sequence[Dict[str, Any]], path: Union[str, Path], title: str = '') -> bool:
    """Draw accuracy and throughput of the methods in two panels; a whole PNG file or none.

    Args:
        rows: of `summarise`
        path: PNG file to write
        title: heading

    Returns:
        False, and nothing is written, where matplotlib is not installed
    """
    figure = new_figure(10.5, 1.6 + 0.42 * len(rows))
    if figure is None:
        return False
    accuracy, rate = figure.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
    places = range(len(rows))
    for name, offset, color, label in (('knn', -0.2, BLUE, 'kNN'), ('linear', 0.2, ORANGE, 'linear, cached features')):
        values = [row[name] for row in rows]
        errors = [row[f'{name}_std'] or 0 for row in rows]
        accuracy.barh(
            [p + offset for p in places], values, height=0.36, color=color, label=label,
            xerr=errors if any(errors) else None, error_kw=dict(ecolor=GREY, capsize=2))
        for place, value, error in zip(places, values, errors):
            accuracy.text(value + error, place + offset, f' {value:.1f}', va='center', fontsize=7.5, color=GREY)
    accuracy.set_xlim(0, 1.12 * max(max(row['knn'], row['linear']) for row in rows))
    accuracy.set_title('Accuracy', fontsize=10, loc='left')
    accuracy.set_xlabel('top-1, %')
    accuracy.set_yticks(places, [row['method'] for row in rows], fontsize=9)
    accuracy.set_ylim(len(rows) - 0.5, -0.5)
    rate.barh(places, [row['images_per_s'] or 0 for row in rows], height=0.5, color=GREY)
    rate.set_title('Training', fontsize=10, loc='left')
    rate.set_xlabel('images/s')
    for axes in (accuracy, rate):
        open_axes(axes, grid='x')
        axes.tick_params(axis='y', length=0)
    figure.legend(*accuracy.get_legend_handles_labels(), loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    return save_figure(figure, path)
