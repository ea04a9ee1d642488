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

os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # before torch is loaded, see timm_cgh/__init__.py

import torch
from safetensors.torch import save_file
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.arguments import Parser, add_evaluation_arguments, arguments_of, at_least_one, natural, positive
from timm_cgh.data import open_dataset
from timm_cgh.data.decode import read_thumbnail
from timm_cgh.distributed import end_process
from timm_cgh.errors import InputError, checking
from timm_cgh.eval import FeatureExtractor, best_knn
from timm_cgh.eval.backbone import load_backbone
from timm_cgh.eval.datasets import open_labelled_datasets
from timm_cgh.eval.knn import knn_predict_distributed, nearest_neighbors
from timm_cgh.eval.results import describe_accuracy, describe_images, describe_model, write_results
from timm_cgh.eval.start import start_evaluation
from timm_cgh.files import atomic_path, make_folder
from timm_cgh.plots.evaluation import save_class_accuracy, save_retrieval_grid

_logger = logging.getLogger('eval')
DEFAULT_KS = (10, 20, 100, 200)  # the best is reported

parser = Parser(__doc__)
add_evaluation_arguments(parser)
group = parser.add_argument_group('kNN')
group.add_argument('--k', nargs='+', type=at_least_one, metavar='K',
                   help=f"neighbours; default: {', '.join(map(str, DEFAULT_KS))}, up to the number of training images")
group.add_argument('--temperature', type=positive, default=0.07, metavar='T', help='temperature of the vote')
group.add_argument('--pixels', action='store_true',
                   help="raw pixels (at most 32 x 32, of --model's size) instead of features, as a baseline")
group.add_argument('--save-features', metavar='DIR',
                   help='folder to write the feature matrices to (safetensors); default: none')
group.add_argument('--queries', type=natural, default=8, metavar='N', help='rows of the retrieval plot in --output')


def save_features(folder, names, **splits):
    """`<split>.safetensors` of `features` (N, D) float32 and `labels` (N,) int64."""
    metadata = dict(class_names=json.dumps(names)) if names else None
    for split, (features, labels, _) in splits.items():
        path = os.path.join(folder, f'{split}.safetensors')
        with checking('save_features', folder, OSError), atomic_path(path) as temporary:
            save_file(dict(features=features.contiguous(), labels=labels), temporary, metadata)


def save_retrieval(args, data, train, val):
    """Plot some queries, drawn by the seed, and their nearest neighbours."""
    count = len(val.labels)
    queries = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed))[:args.queries].sort().values
    neighbours = nearest_neighbors(train.features, val.features[queries], min(9, len(train.labels)))
    rows = []
    for query, found in zip(val.indices[queries], train.indices[neighbours]):
        shown = [(data.val, int(query)), *((data.train, int(index)) for index in found)]
        images = [read_thumbnail(dataset, index) for dataset, index in shown]
        names = [data.class_names[label] if data.class_names else str(label) for _, label in images]
        rows.append([(image, name, label == images[0][1]) for (image, label), name in zip(images, names)])
    save_retrieval_grid(rows, os.path.join(args.output, 'retrieval.png'))


def main(argv=None):
    args = parser.parse(argv)
    process = start_evaluation(**arguments_of(start_evaluation, args))
    if args.save_features:
        make_folder(args.save_features, 'save_features', args.save_features)

    backbone = load_backbone(**arguments_of(load_backbone, args))
    data = open_labelled_datasets(
        backbone.data_config, args.train_split, args.val_split, **arguments_of(open_dataset, args))
    if args.k and max(args.k) > len(data.train):
        raise InputError(f'k={max(args.k)}: there are only {len(data.train)} training images')
    _logger.info(
        f"{'raw pixels' if args.pixels else backbone.name}: {len(data.train)} training images of {data.num_classes} "
        f'classes, {len(data.val)} validation images, on {process.device}')

    began = time.monotonic()
    extractor = FeatureExtractor(backbone.data_config, process, **arguments_of(FeatureExtractor, args))
    model = extractor.prepare(backbone.model)
    with logging_redirect_tqdm():
        train, val = extractor(model, data.train), extractor(model, data.val)
    extracted = time.monotonic()
    with checking('model', backbone.name, ValueError):  # features that are not finite
        predictions = knn_predict_distributed(
            train.features, train.labels, val.features, process, args.k or DEFAULT_KS, args.temperature)
    accuracy = {k: 100 * (predicted == val.labels).double().mean().item() for k, predicted in predictions.items()}
    best, top1 = best_knn(accuracy)
    for k, value in accuracy.items():
        _logger.info(f"k {k}: top-1 {value:.3f} %{' (best)' if k == best else ''}")

    end_process(process)
    if process.primary:
        if args.save_features:
            save_features(args.save_features, data.class_names, train=train, validation=val)
        if args.output:
            with checking('output', args.output, OSError):
                save_class_accuracy(
                    val.labels, predictions[best], os.path.join(args.output, 'classes.png'), data.class_names)
                if args.queries:
                    save_retrieval(args, data, train, val)
        write_results(dict(
            **describe_model(backbone, args.dataset, args.data_dir, args.val_split),
            protocol='knn',
            **describe_accuracy(top1),
            k=best,
            knn={str(k): round(value, 4) for k, value in accuracy.items()},
            temperature=args.temperature,
            num_features=train.features.shape[1],
            **describe_images(
                backbone.data_config, data.num_classes, (len(train.labels), len(data.train)),
                (len(val.labels), len(data.val))),
            feature_seconds=round(extracted - began, 1),
            seconds=round(time.monotonic() - began, 1),
        ), args.results_file)
    return 0


if __name__ == '__main__':
    sys.exit(parser.run(main))
