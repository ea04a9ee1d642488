"""What a run writes and logs: its settings and description, warnings, the exported backbone, plots."""
import importlib.metadata
import logging
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset

import timm_cgh
from timm_cgh.data import ViewLoader, ViewsToDevice
from timm_cgh.data.decode import read_or_substitute, read_thumbnail
from timm_cgh.errors import redact
from timm_cgh.eval.features import extract_features
from timm_cgh.eval.knn import nearest_neighbors
from timm_cgh.eval.loader import create_eval_loader
from timm_cgh.files import write_yaml
from timm_cgh.plots.curves import save_curves
from timm_cgh.plots.evaluation import save_retrieval_grid, save_views
from timm_cgh.plots.relations import relation_curve, save_relations
from timm_cgh.plots.report import save_report
from timm_cgh.task import CGHTask
from timm_cgh.task.positives import Selection

__all__ = [
    'describe_epoch', 'list_files', 'warn_if_collapsed', 'warn_if_flat', 'write_neighbours', 'write_plots',
    'write_settings', 'write_views']

_logger = logging.getLogger('train')


def _commit() -> Optional[str]:
    """Commit of the checkout that the package lies in, with `-dirty` where files were changed; None for a wheel."""
    root = Path(__file__).parents[2]
    if not (root / '.git').exists():
        return None
    done = subprocess.run(
        ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'], cwd=root, capture_output=True,
        text=True, check=False)
    return done.stdout.strip() or None


def write_settings(folder: str, given: Mapping[str, Any], settled: Mapping[str, Any], **facts: Any) -> Dict[str, Any]:
    """Write `args.yaml`, the options as given, and `resolved.yaml`, what they came to on this machine.

    Args:
        folder: of the run
        given: options, good for `--config`
        settled: the same with every default filled in
        **facts: what else the run depends on, for `resolved.yaml`, whose content is returned
    """
    versions = {name: importlib.metadata.version(name) for name in ('torch', 'torchvision', 'timm', 'Pillow', 'numpy')}
    resolved = dict(
        options=redact(dict(settled)),
        **facts,
        versions=dict(python=platform.python_version(), timm_cgh=timm_cgh.__version__, **versions),
        commit=_commit(),
    )
    write_yaml(os.path.join(folder, 'args.yaml'), given)
    write_yaml(os.path.join(folder, 'resolved.yaml'), resolved)
    return resolved


def warn_if_flat(views: torch.Tensor) -> None:
    """Warn where nearly all pixels of (B, C, H, W) uint8 views have nearly one value: images on another scale."""
    low, high = np.percentile(views.numpy(), (1, 99))
    if high - low <= 16:
        _logger.warning(
            f'Nearly all pixels of some images lie between {low:.0f} and {high:.0f} of 255. If the files have more '
            f'than 8 bits, `pixel_range` says which values are black and white.')


def _spread(count: int) -> List[int]:
    """Up to six of `count` indices, evenly spaced: of folders of classes, from several."""
    return sorted({round(i) for i in np.linspace(0, count - 1, 6)})


def write_views(folder: str, loader: ViewLoader, to_device: ViewsToDevice) -> None:
    """Write `views.png`: some images, no stream's, and their views as the networks see them in the first epoch."""
    views: Any = loader.loader.dataset
    batch = loader.read(_spread(len(views)))
    warn_if_flat(batch.views[0])
    images = [np.atleast_3d(read_or_substitute(views.dataset, index)[0]) for index in batch.index.tolist()]
    teacher, *student = (to_device.to_pixels(view).numpy() for view in to_device(batch))
    rows = {'image': images, 'teacher': teacher, 'student': student[0]}
    rows.update((f'{crop.shape[1]} px', crop) for crop in student[1:])
    save_views(rows, os.path.join(folder, 'views.png'))


def write_neighbours(
        folder: str,
        images: Dataset,
        model: nn.Module,
        data_config: Dict[str, Any],
        device: torch.device,
) -> None:
    """Write `neighbours.png`: some (map-style) images, and those of most similar features, with the cosine."""
    loader = create_eval_loader(images, data_config, 64, device=device, numbered=True)
    features, rows = extract_features(model, loader, device)
    queries = _spread(len(features))
    found = nearest_neighbors(features, features[queries], min(9, len(features)))
    grid = []
    for query, places in zip(queries, found.tolist()):
        others = [place for place in places if place != query]
        cosines = F.cosine_similarity(features[query], features[others])
        captions = ['query', *(f'{cosine:.2f}' for cosine in cosines.tolist())]
        indices = rows[[query, *others], 1].tolist()
        grid.append([(read_thumbnail(images, index)[0], caption, None) for index, caption in zip(indices, captions)])
    save_retrieval_grid(
        grid, os.path.join(folder, 'neighbours.png'), 'Nearest training images, by cosine of the features')


def describe_epoch(row: Mapping[str, Any]) -> str:
    """What matters most in a row of `summary.csv`, in at most 100 columns."""
    names = [name for name in ('gh', 'hg', 'gg', 'hh', 'nce') if f'train_loss_{name}' in row]
    parts = [f"{name} {row[f'train_loss_{name}']:.3f}" for name in names]
    text = f"epoch {row['epoch']}: loss {row['train_loss']:.3f}" + (f" ({', '.join(parts)})" if parts[1:] else '')
    for column, format in (
            ('eval_knn', 'kNN {:.2f} %'), ('eval_rankme', 'RankMe {:.4g}'), ('train_images_per_s', '{:.0f} images/s')):
        if column in row:
            text += ', ' + format.format(row[column])
    return text


def warn_if_collapsed(row: Mapping[str, Any], bank_size: int) -> None:
    """Warn where an epoch's averages are those of a collapsed representation or of targets without information."""
    for name in ('global', 'hyper'):
        std, entropy = row.get(f'train_std_{name}'), row.get(f'train_entropy_{name}')
        if std is not None and std < 0.05:
            _logger.warning(
                f'The {name} embeddings are nearly one point (standard deviation {std:.3f} of 1): the representation '
                f'has collapsed. A lower learning rate, longer warm-up or longer InfoNCE warm-up may help.')
        if entropy is not None and math.log(bank_size) - entropy < 0.02:
            _logger.warning(
                f'The {name} targets are flat over the bank (entropy {entropy:.2f} of {math.log(bank_size):.2f}): '
                f'there is nothing to learn from them. A lower teacher temperature or longer InfoNCE warm-up may help.')


def write_plots(
        folder: str,
        task: CGHTask,
        rows: Sequence[Mapping[str, Any]],
        knn_baselines: Mapping[str, Optional[float]],
        selection: Optional[Selection] = None,
) -> None:
    """Write `curves.png`, `relations.png` where relations were tracked, and `report.html`, once an epoch is finished.

    Args:
        folder: of the run
        task: whose banks were tracked, by `selection`
        rows: of `summary.csv`
        knn_baselines: name -> top-1 in percent, None where it was not measured
    """
    if not rows:
        return
    name = os.path.basename(folder)
    baselines = {key: value for key, value in knn_baselines.items() if value is not None}
    if not save_curves(rows, os.path.join(folder, 'curves.png'), name, baselines):
        _logger.info('No plots: matplotlib is not installed (pip install matplotlib)')
    elif selection is not None:
        curves = [relation_curve(rows, context) for context in sorted(task.banks, reverse=True)]  # hyper first
        path = os.path.join(folder, 'relations.png')
        save_relations(curves, path, selection, [task.banks['global'].size], name)
    save_report(folder)


def list_files(folder: str) -> List[str]:
    """Names of the files that a run leaves in its folder, of those that are there."""
    names = (
        'args.yaml', 'resolved.yaml', 'train.log', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', 'export/',
        'report.html', 'curves.png', 'views.png', 'neighbours.png', 'relations.png')
    return [name for name in names if os.path.exists(os.path.join(folder, name))]
