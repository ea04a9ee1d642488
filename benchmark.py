#!/usr/bin/env python3
"""Cost of CGH relative to a lower bound or to other software: the step, the data path, both together, kNN.

    python benchmark.py step --model resnet18 --img-size 64 --batch-size 64 --bank-size 16384
    python benchmark.py loss --batch-size 256                           # growth with the bank, and that of its products
    python benchmark.py processes --device cpu                          # one thread each, against one process of all
    python benchmark.py variants                                        # what predictor, stages, multi-crop cost
    python benchmark.py data --data-dir images/ --img-size 224          # folder, tar or hfds
    python benchmark.py e2e --data-dir images/ --model resnet50 --img-size 224 --batch-size 256 --workers 8
    python benchmark.py knn                                             # needs faiss-cpu

Things that are compared are timed in turn in one process; the figure to quote is the median of the ratios.
"""
import importlib.util
import json
import os
import platform
import sys

os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # as in train.py and the eval scripts, for everything compared

import timm
import torch

import benchmarks
from timm_cgh.arguments import Parser, at_least_one, natural
from timm_cgh.distributed import init_process
from timm_cgh.errors import InputError, checking, redact
from timm_cgh.files import atomic_write, make_folder
from timm_cgh.loss import CONTEXTS
from timm_cgh.models.backbone import check_model

COMMANDS = {
    'step': benchmarks.benchmark_step,
    'loss': benchmarks.benchmark_loss,
    'processes': benchmarks.benchmark_processes,
    'variants': benchmarks.benchmark_variants,
    'data': benchmarks.benchmark_data,
    'e2e': benchmarks.benchmark_e2e,
    'knn': benchmarks.benchmark_knn,
}

parser = Parser(__doc__)
commands = parser.add_subparsers(dest='command', required=True)
for command, function in COMMANDS.items():
    sub = commands.add_parser(command, description=function.__doc__)
    sub.add_argument('--turns', type=at_least_one, default=7, help='times that everything is measured in turn')
    sub.add_argument('--json', metavar='FILE', help='file for all figures; default: none')
    if command == 'knn':
        continue
    on_images = command in ('data', 'e2e')
    sub.add_argument('--batch-size', type=at_least_one, default=50 if command == 'data' else 64,
                     help='images in a batch')
    if command != 'loss':
        sub.add_argument('--img-size', type=at_least_one, default=224 if on_images else 64, help='side of the images')
    if on_images:
        sub.add_argument('--data-dir', metavar='DIR', help='folder or tar of images, as in train.py; default: none')
        sub.add_argument('--dataset', metavar='NAME', default='',
                         help='data set by name, as in train.py; default: the folder')
        sub.add_argument('--split', metavar='NAME', default='train', help='split of the data set, as in train.py')
    if command == 'data':
        sub.add_argument('--images', type=at_least_one, default=1000, help='images per turn, at most')
        continue
    sub.add_argument('--bank-size', type=at_least_one, default=131072 if command == 'loss' else 16384,
                     help='embeddings in a memory bank')
    sub.add_argument('--repeats', type=at_least_one, default=5, help='steps of a turn')
    sub.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                     help='cpu, cuda, cuda:1, ...; default: cuda where available, else cpu')
    if command == 'loss':
        sub.add_argument('--embed-dim', type=at_least_one, default=512, help='width of the embeddings')
        continue
    sub.add_argument('--model', default='resnet18', help='timm model of the backbone')
    if command != 'variants':
        sub.add_argument('--context', choices=CONTEXTS, default='cross', help='context of the loss, as in train.py')
    sub.add_argument('--amp', action='store_true', help='mixed precision in bfloat16')
    sub.add_argument('--channels-last', action='store_true', help='memory format of convolutions')
    sub.add_argument('--torchcompile', action='store_true', help='compile the step with torch.compile')
    if command == 'step':
        sub.add_argument('--parts', action='store_true', help='time of the parts beyond the floor')
        sub.add_argument('--lightly', action='store_true', help="compare with lightly's MoCo")
    if command == 'e2e':
        sub.add_argument('--workers', type=natural, default=min(4, os.cpu_count() or 1),
                         help='processes that read images')


def check(args):
    """Reject what cannot be measured before anything is."""
    if getattr(args, 'batch_size', 2) < 2:
        raise InputError('batch_size=1: must be at least 2')
    if args.command == 'loss' and args.bank_size < 8:
        raise InputError(f'bank_size={args.bank_size}: must be at least 8, eighths of it are measured')
    if args.command == 'knn' and importlib.util.find_spec('faiss') is None:
        raise InputError('knn: needs faiss (pip install faiss-cpu)')
    if getattr(args, 'lightly', False) and importlib.util.find_spec('lightly') is None:
        raise InputError("lightly: needs the lightly library (pip install 'timm-cgh[baselines]')")
    if hasattr(args, 'model'):
        check_model(args.model)
    if args.json:
        make_folder(os.path.dirname(args.json) or '.', 'json', args.json)
    init_process(getattr(args, 'device', 'cpu'))


def measure(args):
    check(args)
    torch.backends.cuda.matmul.allow_tf32 = getattr(args, 'amp', False)  # as in train.py
    result = COMMANDS[args.command](args)
    cpu = f'{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}'
    on_gpu = torch.device(getattr(args, 'device', 'cpu')).type == 'cuda'
    result.update(
        options=redact(vars(args)),
        processor=torch.cuda.get_device_name() if on_gpu else cpu,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
    )
    if args.json:
        with checking('json', args.json, OSError), atomic_write(args.json) as file:
            json.dump(result, file, indent=2)
    return 0


def main(argv=None):
    args = parser.parse_args(argv)
    return commands.choices[args.command].run(lambda _: measure(args))  # errors name the options of the subparser


if __name__ == '__main__':
    sys.exit(parser.run(main))
