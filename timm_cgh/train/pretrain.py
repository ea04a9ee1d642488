"""Pre-training from Python: the job of `train.py` as a function."""
import contextlib
import importlib
import logging
import os
from typing import Any, Dict, List, NamedTuple, Optional

import timm
import torch.nn as nn

from timm_cgh.progress import log_to_console

__all__ = ['Result', 'pretrain']


class Result(NamedTuple):
    """What a run of pre-training leaves.

    Args:
        folder: of the run, with checkpoints, curves and `export/`
        backbone: the trained backbone on the CPU, a plain timm model without classifier, in eval mode
        epochs: rows of `summary.csv`: losses, kNN accuracy and other figures that an epoch has, as numbers
        knn: top-1 in percent of the last kNN evaluation, None where no images are labelled
    """
    folder: str
    backbone: nn.Module
    epochs: List[Dict[str, Any]]
    knn: Optional[float]


def pretrain(data_dir: Optional[str] = None, model: Optional[str] = None, **options: Any) -> Result:
    """Pre-train a timm backbone on unlabelled images, in this process.

    Args:
        data_dir: folder of images (class folders or none), tar, or the root of `dataset`
        model: any timm model, default that of `config`, or ResNet-50
        **options: those of `train.py`, with underscores: `epochs=100`, `img_size=64`, `multi_crop=[]`,
            `config='my.yaml'`; all of them: `timm-cgh train --help`

    Returns:
        the run's folder, the backbone and the figures of each epoch

    Raises:
        InputError: no such option, a value that cannot be used, images that cannot be read
        KeyboardInterrupt: Ctrl-C, once the state is saved; `resume='auto'` with the same `experiment` continues
        FloatingPointError: the loss is not finite
    """
    train: Any = importlib.import_module('timm_cgh.scripts.train')
    options.update(data_dir=data_dir, model=model)
    args = train.parser.parse_values(**{name: value for name, value in options.items() if value is not None})
    with contextlib.nullcontext() if logging.root.handlers else log_to_console():
        try:
            run = train.pretrain(args)
        except SystemExit as stopped:  # a signal before the first step
            raise KeyboardInterrupt from stopped
    if run.exit_code == 1:
        raise FloatingPointError(f'the loss is not finite: see the log in {run.folder}')
    if run.exit_code:
        raise KeyboardInterrupt(f'stopped by {run.stop.name}; the state is saved in {run.folder}')
    backbone = timm.create_model(f"local-dir:{os.path.join(run.folder, 'export')}", pretrained=True, num_classes=0)
    return Result(run.folder, backbone.eval(), run.summary.rows, run.knn)
