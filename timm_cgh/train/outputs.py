"""What a run writes and logs: its description, warnings, the exported backbone, plots."""
import logging
import math
import os
from typing import Any, List, Mapping, Optional, Sequence

from timm_cgh.eval.loader import eval_crop_pct
from timm_cgh.files import epochs_done
from timm_cgh.models.export import export_backbone
from timm_cgh.plots.curves import save_curves
from timm_cgh.plots.relations import relation_curve, save_relations
from timm_cgh.task import CGHTask, MomentumTask
from timm_cgh.task.positives import Selection

from .build import Backbone

__all__ = ['describe_run', 'export_run', 'list_files', 'warn_if_collapsed', 'write_plots']

_logger = logging.getLogger('train')


def describe_run(task: MomentumTask, model: str, method: str, context: str) -> str:
    """Model and method in one line."""
    millions = sum(p.numel() for p in task.student.backbone.parameters()) / 1e6
    return f'{model} ({millions:.2f} M parameters), {f"{context} context" if method == "cgh" else method}'


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


def export_run(
        folder: str,
        backbone: Backbone,
        data_config: Mapping[str, Any],
        method: str,
        rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write the backbone as it is now, a plain timm model with the tag `<method>_<epochs>ep`, to `export/`."""
    export_backbone(
        backbone.module,
        os.path.join(folder, 'export'),
        **data_config,
        crop_pct=eval_crop_pct(data_config['input_size'][-1]),
        tag=f'{method}_{epochs_done(rows)}ep',
        model_kwargs=backbone.model_kwargs,
    )


def write_plots(
        folder: str,
        task: CGHTask,
        rows: Sequence[Mapping[str, Any]],
        knn_baselines: Mapping[str, Optional[float]],
        selection: Optional[Selection] = None,
) -> None:
    """Write `curves.png` and, where relations were tracked, `relations.png`; needs a finished epoch and matplotlib.

    Args:
        folder: of the run
        task: whose banks were tracked
        rows: of `summary.csv`
        knn_baselines: name -> top-1 in percent, None where it was not measured
        selection: of the tracked relations
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


def list_files(folder: str) -> List[str]:
    """Names of the files that a run leaves in its folder, of those that are there."""
    names = ('args.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', 'export/', 'curves.png', 'relations.png')
    return [name for name in names if os.path.exists(os.path.join(folder, name))]
