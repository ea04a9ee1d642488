"""What the evaluation scripts share: their options, backbone, labelled data, features over processes, results."""
import argparse
import csv
import json
import logging
import os
from typing import Any, Dict, Iterator, Tuple

import numpy as np
import torch
import torch.distributed as dist
from timm import utils
from torch.utils.data import Dataset

from timm_cgh.arguments import Parser, at_least_one, natural, positive
from timm_cgh.data import (
    ImageSubset, class_numbers, data_name, image_mode, is_stream, labels_of, open_dataset)
from timm_cgh.data.sources import find_split_folder
from timm_cgh.errors import InputError, blame
from timm_cgh.files import atomic_write, make_folder

from .backbone import load_backbone
from .extract import extract_distributed

__all__ = [
    'add_common_arguments', 'check_classes', 'end_run', 'extract_distributed', 'init_run', 'load_backbone',
    'open_labelled', 'what_is_judged', 'write_results',
]

_logger = logging.getLogger('eval')


def add_common_arguments(parser: Parser) -> None:
    """Add the options that every evaluation has: --config and the groups Data, Model and Run."""
    parser.add_argument('-c', '--config', metavar='FILE',
                        help='YAML file of these options; the command line overrides it')
    group = parser.add_argument_group('Data')
    group.add_argument('--data-dir', metavar='DIR', help='folder of splits of class folders, or root of --dataset')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help="digits, or timm's torch/..., hfds/...; default: the folder")
    group.add_argument('--train-split', metavar='NAME', default='train')
    group.add_argument('--val-split', metavar='NAME', default='validation',
                       help='judged; a folder may call it val or valid')
    group.add_argument('--dataset-download', action='store_true',
                       help='allow the download of torch/ and other data sets')
    group.add_argument('--dataset-trust-remote-code', action='store_true')
    group.add_argument('--class-map', metavar='FILE', default='')
    group.add_argument('--input-key', metavar='NAME')
    group.add_argument('--target-key', metavar='NAME')
    group.add_argument('-j', '--workers', metavar='N', type=natural, default=min(4, os.cpu_count() or 1))
    group = parser.add_argument_group('Model')
    group.add_argument('--model', metavar='NAME',
                       help="timm model, local-dir:RUN/export, hf-hub:OWNER/NAME; default: that of --checkpoint's run")
    group.add_argument('--checkpoint', metavar='FILE',
                       help='weights (safetensors or torch file; ours, MoCo, DINO, ...)')
    group.add_argument('--teacher', action='store_true', help="the teacher in --checkpoint, a run's last.pth.tar")
    group.add_argument('--no-pretrained', action='store_true', help='random weights: the level to start from')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs, metavar='KEY=VALUE')
    group.add_argument('--img-size', metavar='PX', type=at_least_one, help="default: the model's")
    group.add_argument('--in-chans', metavar='N', type=int, help="3 (colour) or 1 (grey); default: the model's")
    group.add_argument('--mean', nargs='+', type=float, metavar='X', help="of pixels in [0, 1]; default: the model's")
    group.add_argument('--std', nargs='+', type=positive, metavar='X')
    group = parser.add_argument_group('Run')
    group.add_argument('-b', '--batch-size', type=at_least_one, default=256, metavar='N', help='per process')
    group.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    group.add_argument('--amp', action='store_true', help='mixed precision')
    group.add_argument('--amp-dtype', choices=('float16', 'bfloat16'), default='float16')
    group.add_argument('--channels-last', action='store_true')
    group.add_argument('--seed', type=natural, default=42, metavar='N')
    group.add_argument('--output', metavar='DIR', help='folder for pictures and other files; default: none are written')
    group.add_argument('--results-file', metavar='FILE', help='.json or .csv; the results are printed in any case')


def init_run(args: argparse.Namespace) -> torch.device:
    """Logging, processes, seeds, and folders that can be written; gives the device of this process.

    Sets `args.distributed`, `args.world_size`, `args.rank` and `args.local_rank`, as timm's scripts have them.

    Raises:
        InputError: no such device, or a place that cannot be written
    """
    utils.setup_default_logging()
    # The softmax of a head at a high rate is full of numbers below 1e-38, which a CPU multiplies at a fraction of its
    # speed. Threads take the setting over from the one that starts them: now, while there is but one.
    torch.set_flush_denormal(True)
    with blame('--device', args.device):
        device = utils.init_distributed_device(args)
    if not utils.is_primary(args):
        for name in ('eval', 'train'):
            logging.getLogger(name).setLevel(logging.WARNING)
    utils.random_seed(args.seed)  # the same on all processes
    if args.results_file and not args.results_file.endswith(('.json', '.csv')):
        raise InputError(f'--results-file {args.results_file}: must end in .json or .csv')
    results_folder = os.path.dirname(args.results_file) or '.' if args.results_file else None
    for flag, value, folder in (
            ('--output', args.output, args.output), ('--results-file', args.results_file, results_folder)):
        if folder is not None:
            make_folder(folder, flag, value)
    return device


def open_labelled(args: argparse.Namespace, split: str, is_training: bool = False) -> Dataset:
    """A split of the data set, its labelled images only: (PIL image, label) items.

    Raises:
        InputError: no such split, a stream, no labels
    """
    flag = '--train-split' if split == args.train_split else '--val-split'
    if args.train_split == args.val_split:
        raise InputError(f'--val-split {args.val_split}: is the training split, where each image would find itself')
    folder = not args.dataset and args.data_dir and os.path.isdir(args.data_dir)
    if folder and find_split_folder(args.data_dir, split) is None \
            and any(find_split_folder(args.data_dir, name) for name in ('train', 'validation', 'test')):
        raise InputError(f'{flag} {split}: no such folder in {args.data_dir}')  # all of it would be read
    dataset = open_dataset(
        args.dataset,
        args.data_dir,
        split,
        is_training=is_training,
        batch_size=args.batch_size,
        seed=args.seed,
        in_chans=args.in_chans or 3,
        download=args.dataset_download,
        class_map=args.class_map,
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
        split_flag=flag,
    )
    if is_stream(dataset):
        raise InputError(
            f'--dataset {args.dataset}: a stream, whose images cannot be counted; take a folder, torch/ or hfds/')
    labels = labels_of(dataset)
    labelled = np.flatnonzero(labels >= 0) if labels is not None else ()
    if not len(labelled):
        raise InputError(f'{flag} {split}: has no labels')
    return dataset if len(labelled) == len(labels) else ImageSubset(dataset, labelled, image_mode(args.in_chans or 3))


def check_classes(train: Dataset, val: Dataset) -> int:
    """Number of classes of the training images, once the other images are known to be of the same ones.

    Raises:
        InputError: fewer than two classes, or classes among the other images that the training images have not
    """
    train_labels, val_labels = labels_of(train), labels_of(val)
    classes = np.unique(train_labels)
    if len(classes) < 2:
        raise InputError('--data-dir: the training images are all of one class, put them in class folders')
    train_names, val_names = class_numbers(train), class_numbers(val)
    foreign = sorted(str(name) for name in set(val_names) - set(train_names)) if train_names else []
    foreign = foreign or [str(label) for label in np.setdiff1d(val_labels, classes)]
    if foreign:
        raise InputError(
            f"--val-split: {len(foreign)} classes that the training images have not ({', '.join(foreign[:5])})")
    moved = next((name for name, number in val_names.items() if train_names.get(name, number) != number), None)
    if moved is not None:
        raise InputError(f'--val-split: {moved} is another number there than in training, give --class-map')
    return int(classes[-1]) + 1


def what_is_judged(args: argparse.Namespace) -> Dict[str, str]:
    """First entries of every result: the model, where its weights are from and which they are, on what data."""
    if args.checkpoint:
        weights = os.path.basename(args.checkpoint) + (', teacher' if args.teacher else '')
    else:
        weights = 'random' if args.no_pretrained else 'its own'
    return dict(
        model=args.model,
        weights=weights,
        digest=args.digest,
        dataset=data_name(args.dataset, args.data_dir),
        val_split=args.val_split,
    )


def _flat(values: Dict[str, Any], prefix: str = '') -> Iterator[Tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f'{prefix}{name}_')
        else:
            yield f'{prefix}{name}', value


def write_results(args: argparse.Namespace, results: Dict[str, Any]) -> None:
    """Print results as timm's validate.py does, and write --results-file; the first process does, the others nothing.

    Args:
        results: figures by name; nested ones become columns `outer_inner` of a CSV file
    """
    if not utils.is_primary(args):
        return
    print(f'--result\n{json.dumps(results, indent=4)}', flush=True)
    if not args.results_file:
        return
    with blame('--results-file', args.results_file), atomic_write(args.results_file) as file:
        if args.results_file.endswith('.csv'):
            row = dict(_flat(results))
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator='\n')
            writer.writeheader()
            writer.writerow(row)
        else:
            file.write(json.dumps(results, indent=4) + '\n')


def end_run(args: argparse.Namespace) -> int:
    """Let the processes end together; gives the exit code."""
    if args.distributed:
        dist.barrier()
        dist.destroy_process_group()
    return 0
