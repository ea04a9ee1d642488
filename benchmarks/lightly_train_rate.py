"""Images per second of LightlyTrain, which needs a separate process: it changes settings of the whole process."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, List, Sequence

import timm
import torch
import torch.nn as nn

__all__ = ['lightly_train_rate']


def lightly_train_rate(args: argparse.Namespace, method: str, images: Sequence[str], ahead: int) -> float:
    """Images per second of one epoch of `lightly_train.pretrain`, of two views of `--img-size` px each.

    Args:
        args: options of `benchmark.py e2e`
        method: of LightlyTrain, with its own augmentation; without local crops
        images: files of the epoch, some more than once
        ahead: steps at the beginning that are not timed

    Raises:
        RuntimeError: LightlyTrain failed; with the end of its output
    """
    options = dict(
        images=list(images), method=method, model=args.model, img_size=args.img_size, batch_size=args.batch_size,
        workers=args.workers, ahead=ahead, device=args.device, amp=args.amp)
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, 'options.json'), 'w', encoding='utf-8') as file:
            json.dump(options, file)
        done = subprocess.run(
            [sys.executable, '-m', __name__, folder], cwd=Path(__file__).parents[1], capture_output=True, text=True,
            env={**os.environ, 'LIGHTLY_TRAIN_EVENTS_DISABLED': '1'})
        if done.returncode:
            raise RuntimeError(f'LightlyTrain: {done.stderr.strip()[-2000:]}')
        with open(os.path.join(folder, 'rate.json'), encoding='utf-8') as file:
            return json.load(file)


_began: List[float] = []


def _note(module: nn.Module, _: Any) -> None:
    """Forward hook; on module level, because LightlyTrain pickles it with the model."""
    if module.training and torch.is_grad_enabled():  # the student's, not its teacher's
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        _began.append(time.perf_counter())


def main(folder: str) -> None:
    import lightly_train
    with open(os.path.join(folder, 'options.json'), encoding='utf-8') as file:
        options = json.load(file)
    data, ahead, size = os.path.join(folder, 'images'), options['ahead'], options['batch_size']
    os.mkdir(data)
    for number, path in enumerate(options['images']):
        os.symlink(path, os.path.join(data, f'{number}{os.path.splitext(path)[1]}'))
    model = timm.create_model(options['model'], num_classes=0)
    first = next(module for module in model.modules() if not list(module.children()))
    first.register_forward_pre_hook(_note)
    transform = dict(image_size=(options['img_size'], options['img_size']))
    if options['method'] == 'dino':
        transform['local_view'] = None
    lightly_train.pretrain(
        out=os.path.join(folder, 'out'),
        data=data,
        model=model,
        method=options['method'],
        epochs=1,
        batch_size=size,
        num_workers=options['workers'],
        accelerator='gpu' if options['device'].startswith('cuda') else 'cpu',
        precision='bf16-mixed' if options['amp'] else '32-true',
        transform_args=transform,
    )
    steps = len(options['images']) // size
    starts = _began[::len(_began) // steps]  # the first of each step's forward passes
    with open(os.path.join(folder, 'rate.json'), 'w', encoding='utf-8') as file:
        json.dump(size * (steps - 1 - ahead) / (starts[-1] - starts[ahead]), file)


if __name__ == '__main__':
    main(sys.argv[1])
