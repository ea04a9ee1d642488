"""Methods side by side: accuracy, speed and memory of each, as tables and as a chart."""
import os
import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Union

from timm_cgh.files import atomic_write, write_csv
from timm_cgh.plots.style import BLUE, GREY, ORANGE, new_figure, plot, save_figure

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


# field of a run -> decimals in the table
_MEASURES = {'knn': 2, 'linear': 2, 'images_per_s': 0, 'peak_memory_mib': 0}


def summarise(runs: Sequence[Run]) -> List[Dict[str, Any]]:
    """One row per method, in the order of their first runs: means and standard deviations over the seeds.

    Returns:
        `method`, `seeds` and, per measure, its mean and `<measure>_std` (of a sample; None for one seed); None where no
        run has the measure
    """
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        seeds = [run for run in runs if run.method == method]
        row: Dict[str, Any] = dict(method=method, seeds=len(seeds))
        for name in _MEASURES:
            values = [getattr(run, name) for run in seeds if getattr(run, name) is not None]
            row[name] = statistics.fmean(values) if values else None
            row[f'{name}_std'] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def _cell(row: Dict[str, Any], name: str) -> str:
    mean, deviation, decimals = row[name], row[f'{name}_std'], _MEASURES[name]
    if mean is None:
        return ''
    return f'{mean:.{decimals}f}' + ('' if deviation is None else f' ± {deviation:.{decimals}f}')


def _markdown(rows: Sequence[Dict[str, Any]]) -> str:
    lines = [
        '| method | seeds | kNN top-1, % | linear top-1, % | images/s | peak memory, MiB |',
        '|---|--:|--:|--:|--:|--:|',
    ]
    for row in rows:
        cells = [row['method'], str(row['seeds']), *(_cell(row, name) for name in _MEASURES)]
        lines.append(f"| {' | '.join(cells)} |")
    return '\n'.join(lines) + '\n'


def save_tables(runs: Sequence[Run], folder: Union[str, Path]) -> None:
    """Write `compare.csv` and `compare.md` (one row per method) and `runs.csv` (one row per run)."""
    rows = summarise(runs)
    for name, records in (('compare.csv', rows), ('runs.csv', [run._asdict() for run in runs])):
        write_csv(os.path.join(folder, name), list(records[0]), (
            [round(v, 4) if isinstance(v, float) else v for v in record.values()] for record in records))
    with atomic_write(os.path.join(folder, 'compare.md')) as file:
        file.write(_markdown(rows))


@plot
def save_chart(runs: Sequence[Run], path: Union[str, Path], title: str = '') -> None:
    """Plot accuracy and training speed of the methods in two panels, as a PNG file.

    Raises:
        OSError: the file cannot be written
    """
    rows = summarise(runs)
    figure = new_figure(10.5, 1.6 + 0.42 * len(rows))
    accuracy, speed = figure.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
    places = range(len(rows))
    for name, offset, color, label in (('knn', -0.2, BLUE, 'kNN'), ('linear', 0.2, ORANGE, 'linear, cached features')):
        values = [row[name] for row in rows]
        errors = [row[f'{name}_std'] or 0 for row in rows]
        bars = accuracy.barh(
            [p + offset for p in places], values, height=0.36, color=color, label=label,
            xerr=errors if any(errors) else None, error_kw=dict(ecolor=GREY, capsize=2))
        accuracy.bar_label(bars, fmt='%.1f', padding=2, fontsize=7.5, color=GREY)
    limit = 1.12 * max(max(row['knn'], row['linear']) for row in rows)
    accuracy.set(title='Accuracy', xlabel='top-1, %', xlim=(0, limit), ylim=(len(rows) - 0.5, -0.5))
    accuracy.set_yticks(places, [row['method'] for row in rows], fontsize=9)
    speed.barh(places, [row['images_per_s'] or 0 for row in rows], height=0.5, color=GREY)
    speed.set(title='Training', xlabel='images/s')
    for axes in (accuracy, speed):
        axes.grid(False, axis='y')
        axes.tick_params(axis='y', length=0)
    figure.legend(*accuracy.get_legend_handles_labels(), loc='outside lower center', ncols=2)
    save_figure(figure, path, title)
