#!/usr/bin/env python3
"""Weighted k-nearest-neighbour classification with the features of a backbone (the paper's Sec. 4 protocol).

    python eval_knn.py --model local-dir:output/train/RUN/export --data-dir images/ --output output/knn
    python eval_knn.py --checkpoint output/train/RUN/last.pth.tar --teacher --dataset torch/cifar10 --data-dir data/
    torchrun --nproc_per_node 8 eval_knn.py --model resnet50 --checkpoint moco.pth.tar --data-dir imagenet/
"""
import json
import logging
import os
import sys
import time

# On a CPU, OpenMP threads that wait for each other spin; beside data workers they would starve one another.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch
from safetensors.torch import save_file
from timm import utils
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.arguments import Parser, at_least_one, natural, positive
from timm_cgh.data import image_mode
from timm_cgh.data.decode import read_or_another
from timm_cgh.errors import InputError, blame
from timm_cgh.eval import Pixels, eval_crop_pct
from timm_cgh.eval.classifier import class_names
from timm_cgh.eval.extract import block_indices, gather_rows
from timm_cgh.eval.knn import best_knn, chunk_size, knn_predict, nearest_neighbors
from timm_cgh.eval.pictures import save_class_accuracy, save_retrieval_grid
from timm_cgh.eval.setup import (
    add_common_arguments, check_classes, end_run, extract_distributed, init_run, load_backbone, open_labelled,
    what_is_judged, write_results)
from timm_cgh.files import atomic_path

_logger = logging.getLogger('eval')
DEFAULT_KS = (10, 20, 100, 200)  # the best is reported

parser = Parser(description='kNN classification with the features of a backbone')
add_common_arguments(parser)
group = parser.add_argument_group('kNN')
group.add_argument('--k', nargs='+', type=at_least_one, metavar='K',
                   help=f"neighbours; default those of {', '.join(map(str, DEFAULT_KS))} that the data set has")
group.add_argument('--temperature', type=positive, default=0.07, metavar='T', help='of the vote')
group.add_argument('--pixels', action='store_true',
                   help="raw pixels (at most 32 x 32, of --model's size) in place of features: the level to beat")
group.add_argument('--save-features', metavar='DIR', help='write the feature matrices there (safetensors)')
group.add_argument('--queries', type=natural, default=8, metavar='N', help='rows of the retrieval picture in --output')


def choose_ks(ks, images):
    """The numbers of neighbours to try."""
    if ks is None:
        return [k for k in DEFAULT_KS if k <= images] or [images]
    if max(ks) > images:
        raise InputError(f'--k {max(ks)}: there are only {images} training images')
    return sorted(set(ks))


def save_features(folder, names, **splits):
    """`<split>.safetensors` of `features` (N, D) float32 and `labels` (N,) int64."""
    with blame('--save-features', folder):
        os.makedirs(folder, exist_ok=True)
        for split, (features, labels) in splits.items():
            with atomic_path(os.path.join(folder, f'{split}.safetensors')) as path:
                save_file(
                    dict(features=features.contiguous(), labels=labels),
                    path,
                    metadata=dict(class_names=json.dumps(names)) if names else None,
                )


def save_retrieval(args, train_set, val_set, train, val, names):
    """Picture of some queries, drawn by the seed, and their nearest neighbours."""
    count = min(args.queries, len(val_set))
    queries = torch.randperm(len(val_set), generator=torch.Generator().manual_seed(args.seed))[:count].sort().values
    neighbours = nearest_neighbors(train[0], val[0][queries], min(9, len(train_set)))

    def item(dataset, index, wanted=None):
        image, label, _ = read_or_another(dataset, int(index), image_mode(args.in_chans))
        image.thumbnail((160, 160))
        return image, names[label] if names else str(label), label == wanted

    rows = []
    for query, found in zip(queries, neighbours):
        label = int(val[1][query])
        rows.append([item(val_set, query, label), *(item(train_set, index, label) for index in found)])
    save_retrieval_grid(rows, os.path.join(args.output, 'retrieval.png'))


def main(argv=None):
    args = parser.parse(argv)
    device = init_run(args)
    primary = utils.is_primary(args)
    if args.save_features:
        with blame('--save-features', args.save_features):
            os.makedirs(args.save_features, exist_ok=True)

    # ---- backbone, data, features
    if args.pixels:
        if args.checkpoint:
            raise InputError('--pixels: no weights are asked for, not with --checkpoint')
        args.no_pretrained = True
    backbone, data_config = load_backbone(args)
    if args.pixels:
        backbone = Pixels(data_config['mean'], data_config['std'])
    train_set, val_set = open_labelled(args, args.train_split), open_labelled(args, args.val_split)
    num_classes = check_classes(train_set, val_set)
    names = class_names(train_set, num_classes)
    ks = choose_ks(args.k, len(train_set))
    if primary:
        what = 'raw pixels' if args.pixels else args.model
        _logger.info(
            f'{what}: {len(train_set)} images of {num_classes} classes, {len(val_set)} to judge by, on {device}')
    began = time.monotonic()
    backbone.to(device).to(memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    with logging_redirect_tqdm():
        train, val = (extract_distributed(backbone, part, data_config, args, device) for part in (train_set, val_set))
    extracted = time.monotonic()
    if args.save_features and primary:
        save_features(args.save_features, names, train=train, validation=val)

    # ---- votes: each process judges whole chunks of queries, so that predictions do not depend on their number
    chunk = chunk_size(len(train[0]))
    mine = block_indices(len(val[0]), chunk, args.rank, args.world_size)
    with blame('--model', args.model):  # features that are not finite
        predictions = knn_predict(
            train[0].to(device), train[1], val[0][mine], ks=ks, temperature=args.temperature, chunk=chunk)
    predictions = {k: gather_rows(p, len(val[0]), chunk, device) for k, p in predictions.items()}
    if not primary:
        return end_run(args)
    accuracy = {k: 100 * (p == val[1]).double().mean().item() for k, p in predictions.items()}
    best, top1 = best_knn(accuracy)
    for k, value in accuracy.items():
        _logger.info(f"k {k}: top-1 {value:.3f} %{' (best)' if k == best else ''}")

    # ---- what it comes to
    if args.output:
        with blame('--output', args.output):
            save_class_accuracy(val[1], predictions[best], os.path.join(args.output, 'classes.png'), names)
            if args.queries:
                save_retrieval(args, train_set, val_set, train, val, names)
    size = data_config['input_size'][-1]
    judged = what_is_judged(args)
    if args.pixels:
        judged['weights'] = 'pixels'
    write_results(args, dict(
        **judged,
        protocol='knn',
        top1=round(top1, 4),
        top1_err=round(100 - top1, 4),
        k=best,
        knn={str(k): round(value, 4) for k, value in accuracy.items()},
        temperature=args.temperature,
        num_classes=num_classes,
        num_features=train[0].shape[1],
        train_images=len(train[1]),
        val_images=len(val[1]),
        img_size=size,
        crop_pct=eval_crop_pct(size),
        interpolation=data_config['interpolation'],
        feature_seconds=round(extracted - began, 1),
        seconds=round(time.monotonic() - began, 1),
    ))
    return end_run(args)


def cli(argv=None):
    return parser.run(main, argv)


if __name__ == '__main__':
    sys.exit(cli())
