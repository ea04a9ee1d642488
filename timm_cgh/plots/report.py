"""The report of a run: one HTML file with its settings, figures and plots, readable without a network."""
import base64
import contextlib
from pathlib import Path
from typing import Any, Dict, List, Union

import jinja2

from timm_cgh.errors import InputError
from timm_cgh.files import atomic_write, epochs_done, read_json, read_resolved, read_rows

__all__ = ['save_report']

_PLOTS = {  # file -> heading, alternative text
    'curves.png': ('Curves', 'loss, learning rate and measures of the representation by epoch'),
    'views.png': ('Views', 'training images and their views as the networks see them in the first epoch'),
    'neighbours.png': ('Nearest neighbours', 'some training images and their nearest neighbours in feature space'),
    'relations.png': ('Relations', "recall and precision of the teacher's positives"),
}
_FIGURES = {  # column of summary.csv -> name, format
    'eval_knn': ('kNN top-1', '{:.2f} %'),
    'eval_one_shot': ('one-shot top-1', '{:.2f} %'),
    'eval_rankme': ('RankMe', '{:.1f}'),
    'eval_alignment': ('alignment', '{:.3f}'),
    'eval_uniformity': ('uniformity', '{:.3f}'),
    'train_loss': ('loss', '{:.3f}'),
    'train_images_per_s': ('images/s', '{:.0f}'),
    'train_data_wait': ('data wait', '{:.0f} %'),
}


def _read_results(folder: Path) -> List[Dict[str, Any]]:
    """Results of evaluations that lie in the run's folder (`--results-file`)."""
    results = []
    for path in sorted(folder.glob('*.json')):
        with contextlib.suppress(InputError):  # some other file
            content = read_json(path)
            if 'protocol' in content:
                results.append(content)
    return results


def save_report(folder: Union[str, Path]) -> Path:
    """Write `report.html` into a run's folder from the files there; returns its path.

    Raises:
        InputError: not the folder of a run
        OSError: the file cannot be written
    """
    folder = Path(folder)
    resolved = read_resolved(folder)
    rows = read_rows(str(folder / 'summary.csv'))
    values = {column: [float(row[column]) for row in rows if row.get(column)] for column in _FIGURES}
    figures = {
        name: format.format(values[column][-1]) for column, (name, format) in _FIGURES.items() if values[column]}
    plots = [
        (heading, text, base64.b64encode((folder / name).read_bytes()).decode())
        for name, (heading, text) in _PLOTS.items() if (folder / name).exists()]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined)
    page = environment.get_template('report.html').render(
        name=folder.resolve().name,
        options=resolved['options'],
        resolved=resolved,
        epochs=epochs_done(rows),
        figures=figures,
        plots=plots,
        results=_read_results(folder),
        export=str(folder / 'export'),
    )
    with atomic_write(folder / 'report.html') as file:
        file.write(page)
    return folder / 'report.html'
