#!/usr/bin/env python3
"""Self-supervised methods side by side: one data set, one backbone, one budget, one machine.

    python compare.py -c configs/cifar10_short.yaml --dataset hfds/... --val-split test --output output/compare
    python compare.py --methods cross global moco --seeds 1 2 3 --data-dir images/ --model resnet18 --epochs 100

Each method and seed is a run of train.py, then eval_knn.py and eval_linear.py --cache-features on what it exported. All
options that are not listed here are train.py's, and the same for all. What is finished is not run again: the same
command goes on after an interruption.
"""
import importlib.util
import json
import logging
import os
import subprocess
import sys
from typing import NamedTuple, Optional

import yaml
from timm import utils

import train
from timm_cgh.arguments import Parser, natural
from timm_cgh.errors import InputError
from timm_cgh.eval.comparison import Run, save_chart, save_tables, summarise
from timm_cgh.files import atomic_write
from timm_cgh.settings import check_method
from timm_cgh.summary import read_rows
from timm_cgh.task import PEERS

_logger = logging.getLogger('train')
# options of train.py by which a comparison may go on with others than it began with
_MAY_DIFFER = ('config', 'data_dir', 'device', 'output', 'seed', 'workers')
ROOT = os.path.dirname(os.path.abspath(__file__))


class Method(NamedTuple):
    """How a method is called, and its options of train.py."""
    title: str
    options: tuple


METHODS = {
    'cross': Method('CGH, cross-context', ('--context', 'cross')),
    'same': Method('CGH, same-context', ('--context', 'same')),
    'global': Method('CGH, global-context (ReSSL)', ('--context', 'global', '--contrast-warmup-epochs', '0')),
    'moco': Method('MoCo-v2', ('--method', 'moco')),
    'simclr': Method('SimCLR', ('--method', 'simclr')),
    'byol': Method('BYOL', ('--method', 'byol')),
    'simsiam': Method('SimSiam', ('--method', 'simsiam')),
    'swav': Method('SwAV, two views', ('--method', 'swav')),
    'nnclr': Method('NNCLR', ('--method', 'nnclr')),
    'dino': Method('DINO, two views', ('--method', 'dino')),
}

parser = Parser(
    description='Self-supervised methods side by side',
    epilog='All other options are those of train.py.',
    allow_abbrev=False,  # --seed and --method are train.py's
)
parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS), metavar='NAME',
                    help=f"default all: {' '.join(METHODS)}")
parser.add_argument('--seeds', nargs='+', type=natural, default=[42], metavar='N', help='a run each')
parser.add_argument('--output', default=os.path.join('output', 'compare'), metavar='DIR')


def bn_splits_of(name, args) -> int:
    """Parts of the batch with batch statistics of their own: in one process, what ShuffleBN is to MoCo on several."""
    if name in PEERS:
        return 1
    if name != 'moco' or args.bn_splits > 1:
        return args.bn_splits
    return next(n for n in (8, 4, 2, 1) if n == 1 or args.batch_size % n == 0 and args.batch_size >= 2 * n)


def options_of(name, args, options) -> list:
    """A method's own options of train.py, behind those that all methods have."""
    splits = bn_splits_of(name, args)
    return [*options, *METHODS[name].options, *(['--bn-splits', splits] if splits != args.bn_splits else [])]


def parse_training(options):
    """Options of train.py, as it reads them itself."""
    return train.parser.parse(
        options, default_config=train.DEFAULT_CONFIG,
        wants_default=lambda a: not a.config and not a.data_dir and not a.dataset)


def call(script, options, log):
    """Run a script of this repository, what it says going to `log`; returns whether it succeeded."""
    command = [sys.executable, os.path.join(ROOT, script), *map(str, options)]
    with open(log, 'a', encoding='utf-8') as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        with open(log, encoding='utf-8') as file:
            _logger.error(f'{script}: exit code {done.returncode}: {file.read().strip().splitlines()[-1]} ({log})')
    return done.returncode == 0


def judge(args, model, folder):
    """kNN and linear (cached features) top-1 in percent of a backbone, None where an evaluation failed."""
    data = ['--workers', args.workers, '--device', args.device, '--seed', args.seed, '--batch-size', args.batch_size]
    for name in ('data_dir', 'dataset', 'train_split', 'val_split', 'class_map', 'input_key', 'target_key'):
        if getattr(args, name):
            data += [f"--{name.replace('_', '-')}", getattr(args, name)]
    data += [f"--{name.replace('_', '-')}" for name in ('dataset_download', 'dataset_trust_remote_code')
             if getattr(args, name)]
    figures = []
    for name, script, options in (
            ('knn', 'eval_knn.py', []), ('linear', 'eval_linear.py', ['--cache-features', '--val-interval', 0])):
        results = os.path.join(folder, f'{name}.json')
        if not os.path.exists(results):
            call(script, [*model, *data, *options, '--results-file', results], f'{folder}.log')
        if not os.path.exists(results):
            return None, None
        with open(results, encoding='utf-8') as file:
            figures.append(json.load(file)['top1'])
    return tuple(figures)


def run_method(args, name, seed, options) -> Optional[Run]:
    """Pre-train, judge; None where something failed."""
    runs = os.path.join(args.output, 'runs')
    label = f'{name}-{seed}'
    folder = os.path.join(runs, label)
    method = [*options_of(name, args, options), '--seed', seed]
    export = os.path.join(folder, 'export')
    rows = read_rows(os.path.join(folder, 'summary.csv'))
    if len(rows) < args.epochs or not os.path.isdir(export):
        _logger.info(f'{label}: training')
        os.makedirs(runs, exist_ok=True)
        where = ['--output', runs, '--experiment', label, '--resume', 'auto']
        if not call('train.py', [*method, *where], f'{folder}.log'):
            return None
        rows = read_rows(os.path.join(folder, 'summary.csv'))
    knn, linear = judge(args, ['--model', f'local-dir:{export}'], folder)
    if linear is None:
        return None
    rates = sorted(float(row['train_images_per_s']) for row in rows)
    memory = [float(row['train_peak_memory_mib']) for row in rows if row.get('train_peak_memory_mib')]
    run = Run(
        method=METHODS[name].title,
        seed=seed,
        knn=knn,
        linear=linear,
        images_per_s=rates[len(rates) // 2],
        peak_memory_mib=max(memory, default=None),
        command=' '.join(map(str, ['python train.py', *method])),
    )
    _logger.info(f'{label}: kNN {knn:.2f} %, linear {linear:.2f} %, {run.images_per_s:.0f} images/s')
    return run


def judge_untrained(args, seed) -> Optional[Run]:
    """The backbone with random weights: the level that every method starts from."""
    folder = os.path.join(args.output, 'runs', f'untrained-{seed}')
    os.makedirs(folder, exist_ok=True)
    model = ['--model', args.model, '--no-pretrained', '--in-chans', args.in_chans]
    if args.model_kwargs:
        model += ['--model-kwargs', *(f'{key}={value}' for key, value in args.model_kwargs.items())]
    for name in ('img_size', 'mean', 'std'):
        value = getattr(args, name)
        if value is not None:
            model += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    knn, linear = judge(args, model, folder)
    return None if linear is None else Run('random weights', seed, knn, linear)


def refuse_another(output, settings) -> None:
    """Refuse a folder with runs of other settings: what is finished there would stand under the wrong title."""
    path = os.path.join(output, 'args.yaml')
    if not os.path.exists(path):
        return
    with open(path, encoding='utf-8') as file:
        there = yaml.safe_load(file)['train']
    for name, value in settings.items():
        if there.get(name) != value:
            raise InputError(f'--output {output}: holds a comparison with {name} {there.get(name)}, not {value}')


def main(argv=None):
    own, options = parser.parse_known_args(argv)
    utils.setup_default_logging()
    args = parse_training(options)
    args.output = own.output
    if args.dataset == 'digits' and not args.val_split:
        args.val_split = 'validation'
    if set(own.methods) & set(PEERS) and importlib.util.find_spec('lightly') is None:
        raise InputError(f"--methods: {', '.join(PEERS)} need the lightly library (pip install 'timm-cgh[peers]')")
    for name in own.methods:
        check_method(parse_training([str(option) for option in options_of(name, args, options)]))
    settings = yaml.safe_load(yaml.safe_dump({k: v for k, v in vars(args).items() if k not in _MAY_DIFFER}))
    refuse_another(args.output, settings)
    os.makedirs(args.output, exist_ok=True)
    with atomic_write(os.path.join(args.output, 'args.yaml')) as file:
        yaml.safe_dump({**vars(own), 'train': vars(args)}, file, default_flow_style=None, sort_keys=False)

    runs, failed = [], []
    for seed in own.seeds:
        args.seed = seed
        untrained = judge_untrained(args, seed)
        if untrained is None:
            return 1  # what a trained one is judged by is the same
        runs.append(untrained)
        for name in own.methods:
            run = run_method(args, name, seed, options)
            (failed if run is None else runs).append(f'{name}-{seed}' if run is None else run)
            rows = summarise(runs)
            save_tables(rows, runs, args.output)
    drawn = save_chart(rows, os.path.join(args.output, 'compare.png'), f'{args.model}, {args.epochs} epochs')
    with open(os.path.join(args.output, 'compare.md'), encoding='utf-8') as file:
        print(file.read())
    _logger.info(f"Files in {args.output}: compare.csv, compare.md, runs.csv{', compare.png' if drawn else ''}")
    if failed:
        _logger.error(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


def cli(argv=None):
    return parser.run(main, argv)


if __name__ == '__main__':
    sys.exit(cli())
