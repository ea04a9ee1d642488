#!/usr/bin/env python3
"""Compare self-supervised methods on one data set, with one backbone, one budget, one machine.

    python compare.py -c configs/cifar10_short.yaml --dataset hfds/... --val-split test --output output/compare
    python compare.py --methods cross global moco --seeds 1 2 3 --data-dir images/ --model resnet18 --epochs 100

Each method and seed is a run of train.py, followed by eval_knn.py and eval_linear.py --cache-features on its export.
All options that are not listed here are those of train.py, and the same for all methods, with two exceptions: MoCo-v2
gets --bn-splits of up to 8, as the batch allows, in place of its ShuffleBN, and ReSSL has no warm-up by InfoNCE.
Finished runs are kept: the same command continues after an interruption.
"""
import importlib.util
import logging
import os
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Optional

import yaml
from timm import utils

import train
from timm_cgh.arguments import Parser, random_seed
from timm_cgh.errors import InputError, redact
from timm_cgh.files import atomic_write, make_folder, read_json, read_rows, read_yaml
from timm_cgh.models.backbone import read_config
from timm_cgh.plots import Run, save_chart, save_tables
from timm_cgh.task import BASELINES
from timm_cgh.train.settings import check_method, settle_decay_rate

_logger = logging.getLogger('compare')
# options of train.py that may change between an interruption and the continuation
_MAY_CHANGE = ('config', 'data_dir', 'device', 'output', 'seed', 'workers')
ROOT = os.path.dirname(os.path.abspath(__file__))


METHODS = {  # title, options of train.py
    'cross': ('CGH, cross-context', ('--context', 'cross')),
    'same': ('CGH, same-context', ('--context', 'same')),
    'global': ('CGH, global-context (ReSSL)', ('--context', 'global', '--contrast-warmup-epochs', '0')),
    'moco': ('MoCo-v2', ('--method', 'moco')),
    'simclr': ('SimCLR', ('--method', 'simclr')),
    'byol': ('BYOL', ('--method', 'byol')),
    'simsiam': ('SimSiam', ('--method', 'simsiam')),
    'swav': ('SwAV, two views', ('--method', 'swav')),
    'nnclr': ('NNCLR', ('--method', 'nnclr')),
    'dino': ('DINO, two views', ('--method', 'dino')),
}

parser = Parser(__doc__, allow_abbrev=False)  # --seed and --method are train.py's
parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS), metavar='NAME',
                    help='methods to compare')
parser.add_argument('--seeds', nargs='+', type=random_seed, default=[42], metavar='N',
                    help='one run per method for each')
parser.add_argument('--output', default=os.path.join('output', 'compare'), metavar='DIR',
                    help='folder of the comparison')


def to_options(args, *names):
    """Command line of the options of these names; those that are not set are left out."""
    options = []
    for name in names:
        value = getattr(args, name)
        if value is False or value in (None, '', {}):
            continue
        options.append(f"--{name.replace('_', '-')}")
        if isinstance(value, dict):
            options += [f'{key}={item}' for key, item in value.items()]
        elif value is not True:
            options += map(str, value if isinstance(value, (list, tuple)) else [value])
    return options


def method_options(name, args, options):
    """Options of train.py for a method: those that all methods share, then its own."""
    splits = 1 if name in BASELINES else args.bn_splits
    if name == 'moco' and splits == 1:  # in one process, they stand in for its ShuffleBN
        splits = max((n for n in (2, 4, 8) if args.batch_size % n == 0 and args.batch_size > n), default=1)
    own = () if splits == args.bn_splits else ('--bn-splits', str(splits))
    _, method = METHODS[name]
    return [*options, *method, *own]


def check_methods(names, args, options):
    """Reject methods that cannot run, and options that a method does not have, before any run."""
    baselines = [name for name in names if name in BASELINES]
    if baselines and importlib.util.find_spec('lightly') is None:
        raise InputError(f"methods={' '.join(baselines)}: need the lightly library (pip install 'timm-cgh[baselines]')")
    for name in names:
        # in train.py's parser: it is its flags that an error names
        train.parser.run(lambda line: check_method(train.parser.parse(line)), method_options(name, args, options))


def open_output(own, args):
    """Write `args.yaml`; reject a folder whose finished runs have other settings."""
    make_folder(args.output, 'output', args.output)
    settle_decay_rate(args)  # older folders hold its value
    path = os.path.join(args.output, 'args.yaml')
    content = yaml.safe_dump({**vars(own), 'train': redact(vars(args))}, default_flow_style=None, sort_keys=False)
    if os.path.exists(path):
        before = redact(read_yaml(path).get('train'))
        if not isinstance(before, dict):
            raise InputError(f'{path}: not the arguments of a comparison')
        for name, value in yaml.safe_load(content)['train'].items():  # as a file holds it: lists for tuples
            if name not in _MAY_CHANGE and before.get(name) != value:
                raise InputError(
                    f'output={args.output}: holds a comparison with {name} {before.get(name)}, not {value}')
    with atomic_write(path) as file:
        file.write(content)


def call(script, options, log):
    """Run a script of this repository with its output appended to a file; returns whether it succeeded.

    A signal that ends this process ends the script first, which saves its state.
    """
    with open(log, 'a', encoding='utf-8') as file:
        process = subprocess.Popen(
            [sys.executable, os.path.join(ROOT, script), *options], stdout=file, stderr=subprocess.STDOUT)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        last = Path(log).read_text(encoding='utf-8').strip().rpartition('\n')[2]
        _logger.error(f'{script}: exit code {code}: {last} ({log})')
    return code == 0


def end(signum, _):
    """Handler of the signals that end a process: the exit code of a shell."""
    raise SystemExit(128 + signum)


def evaluate(args, model, folder):
    """kNN and linear (cached features) top-1 of a backbone in percent; None where an evaluation failed."""
    data = to_options(
        args, 'data_dir', 'dataset', 'train_split', 'val_split', 'class_map', 'input_key', 'target_key',
        'dataset_download', 'dataset_trust_remote_code', 'pixel_range', 'max_pixels', 'workers', 'device',
        'seed', 'batch_size')
    if not args.exif_orientation:
        data.append('--no-exif-orientation')
    top1 = []
    for name, options in (('knn', []), ('linear', ['--cache-features', '--val-interval', '0'])):
        results = os.path.join(folder, f'{name}.json')
        if not os.path.exists(results):
            call(f'eval_{name}.py', [*model, *data, *options, '--results-file', results], f'{folder}.log')
        if not os.path.exists(results):
            return None
        top1.append(read_json(results).get('top1'))
        if not isinstance(top1[-1], (int, float)):
            raise InputError(f'{results}: holds no top1; remove it, and it is measured again')
    return tuple(top1)


def evaluate_untrained(args) -> Optional[Run]:
    """The backbone with random weights, the baseline of every method; None where an evaluation failed."""
    folder = os.path.join(args.output, 'runs', f'untrained-{args.seed}')
    os.makedirs(folder, exist_ok=True)
    model = ['--no-pretrained', *to_options(args, 'model', 'in_chans', 'model_kwargs', 'img_size', 'mean', 'std')]
    top1 = evaluate(args, model, folder)
    return None if top1 is None else Run('random weights', args.seed, *top1)


def is_trained(export, epochs):
    """Whether an export is that of the last epoch: one of an earlier epoch is left by a run that was stopped."""
    config = Path(export, 'config.json')
    return config.exists() and read_config(config)['pretrained_cfg']['tag'].endswith(f'_{epochs}ep')


def run_method(args, name, options) -> Optional[Run]:
    """Train and evaluate; None where either failed."""
    (title, _), label, runs = METHODS[name], f'{name}-{args.seed}', os.path.join(args.output, 'runs')
    folder = os.path.join(runs, label)
    export, summary = os.path.join(folder, 'export'), os.path.join(folder, 'summary.csv')
    method = [*method_options(name, args, options), '--seed', str(args.seed)]
    if not is_trained(export, args.epochs):
        _logger.info(f'{label}: training')
        for results in ('knn.json', 'linear.json'):  # of an earlier export
            Path(folder, results).unlink(missing_ok=True)
        where = ['--output', runs, '--experiment', label, '--resume', 'auto']
        if not call('train.py', [*method, *where], f'{folder}.log'):
            return None
    top1 = evaluate(args, ['--model', f'local-dir:{export}'], folder)
    if top1 is None:
        return None
    rows = read_rows(summary)
    memory = [float(row['train_peak_memory_mib']) for row in rows if row.get('train_peak_memory_mib')]
    run = Run(
        title,
        args.seed,
        *top1,
        images_per_s=statistics.median_high(float(row['train_images_per_s']) for row in rows),
        peak_memory_mib=max(memory, default=None),
        command=shlex.join(['python', 'train.py', *map(redact, method)]),
    )
    _logger.info(f'{label}: kNN {run.knn:.2f} %, linear {run.linear:.2f} %, {run.images_per_s:.0f} images/s')
    return run


def main(argv=None):
    own, options = parser.parse_known_args(argv)
    utils.setup_default_logging()
    args = train.parser.parse(options)
    args.output = own.output
    if args.dataset == 'digits' and not args.val_split:
        args.val_split = 'validation'
    check_methods(own.methods, args, options)
    open_output(own, args)

    runs, failed = [], []
    for seed in own.seeds:
        args.seed = seed
        untrained = evaluate_untrained(args)
        if untrained is None:
            return 1  # every other evaluation would fail likewise
        runs.append(untrained)
        for name in own.methods:
            run = run_method(args, name, options)
            if run is None:
                failed.append(f'{name}-{seed}')
            else:
                runs.append(run)
            save_tables(runs, args.output)

    has_chart = save_chart(runs, os.path.join(args.output, 'compare.png'), f'{args.model}, {args.epochs} epochs')
    print(Path(args.output, 'compare.md').read_text(encoding='utf-8'))
    _logger.info(f"Files in {args.output}: compare.csv, compare.md, runs.csv{', compare.png' if has_chart else ''}")
    if failed:
        _logger.error(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == '__main__':
    for signal_name in {'SIGTERM', 'SIGHUP'} & set(dir(signal)):
        signal.signal(getattr(signal, signal_name), end)
    sys.exit(parser.run(main))
