#!/usr/bin/env python3
"""Look at images without labels: nearest neighbours, near-duplicates and outliers, as tables and pictures.

    python neighbours.py --model local-dir:output/train/RUN/export --data-dir images/ --output output/neighbours
    python neighbours.py --embeddings embeddings.parquet --data-dir images/ --output output/neighbours
"""
import logging
import os
import sys

os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # before torch is loaded, see timm_cgh/__init__.py

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.apply.embeddings import Embeddings, read_embeddings
from timm_cgh.apply.images import find_unreadable, open_images, write_unreadable
from timm_cgh.apply.neighbours import cluster_pairs, find_neighbours, mahalanobis_distances
from timm_cgh.arguments import Parser, add_image_arguments, add_model_arguments, arguments_of, at_least_one, fraction
from timm_cgh.data import open_dataset
from timm_cgh.data.decode import UNREADABLE, read_thumbnail
from timm_cgh.distributed import end_process
from timm_cgh.errors import InputError, checking
from timm_cgh.eval import FeatureExtractor
from timm_cgh.eval.backbone import load_backbone
from timm_cgh.eval.start import start_evaluation
from timm_cgh.files import write_csv
from timm_cgh.plots.evaluation import save_retrieval_grid

_logger = logging.getLogger('eval')

parser = Parser(__doc__)
add_image_arguments(parser)
add_model_arguments(parser, results=False)
group = parser.add_argument_group('Neighbours')
group.add_argument('-o', '--output', metavar='DIR', required=True, help='folder for tables and pictures')
group.add_argument('--embeddings', metavar='FILE',
                   help='file of embed.py to search instead of computing features (--data-dir: for pictures); '
                        'default: none')
group.add_argument('--pixels', action='store_true', help='compare raw pixels (at most 32 x 32) instead of features')
group.add_argument('--k', type=at_least_one, default=10, metavar='K', help='nearest images of each image')
group.add_argument('--threshold', type=fraction, default=0.95, metavar='X',
                   help='cosine at and above which images are near-duplicates')
group.add_argument('--rows', type=at_least_one, default=12, metavar='N', help='rows of each picture')


def compute(args, process):
    """Embeddings of the images, and the images."""
    backbone = load_backbone(**arguments_of(load_backbone, args))
    images = open_images(backbone.data_config, image_list=args.image_list, **arguments_of(open_dataset, args))
    extractor = FeatureExtractor(backbone.data_config, process, **arguments_of(FeatureExtractor, args))
    with logging_redirect_tqdm():
        found = extractor(extractor.prepare(backbone.model), images.dataset)
    if process.primary:
        unreadable = find_unreadable(images, found.indices.tolist())
        write_unreadable(os.path.join(args.output, 'images'), unreadable)
    return Embeddings([images.names[index] for index in found.indices], found.features), images


def read(args):
    """Embeddings of a file, and the images if they are named."""
    embeddings = read_embeddings(args.embeddings)
    if not (args.data_dir or args.image_list or args.dataset):
        return embeddings, None
    config = dict(input_size=(args.in_chans or 3,))
    return embeddings, open_images(config, image_list=args.image_list, **arguments_of(open_dataset, args))


def write_tables(folder, names, found, clusters, outliers, distances):
    """Write neighbours, pairs, clusters and outliers."""
    write_csv(os.path.join(folder, 'neighbours.csv'), ['file_name', 'rank', 'neighbour', 'cosine'], (
        [names[index], rank, names[other], f'{cosine:.6f}']
        for index, pair in enumerate(zip(found.indices.tolist(), found.cosines.tolist()))
        for rank, (other, cosine) in enumerate(zip(*pair), start=1)))
    write_csv(os.path.join(folder, 'duplicates.csv'), ['file_name_1', 'file_name_2', 'cosine'], (
        [names[first], names[second], f'{cosine:.6f}']
        for (first, second), cosine in zip(found.pairs.tolist(), found.pair_cosines.tolist())))
    write_csv(os.path.join(folder, 'clusters.csv'), ['cluster', 'file_name'], (
        [number, names[index]] for number, cluster in enumerate(clusters, start=1) for index in cluster))
    write_csv(os.path.join(folder, 'outliers.csv'), ['file_name', 'distance'], (
        [names[index], f'{distance:.6g}'] for index, distance in zip(outliers, distances)))


def save_grid(args, images, embeddings, rows, name, titles):
    """Plot images and others similar to them; `rows` are lists of indices, the first of each is compared with."""
    places = {name: index for index, name in enumerate(images.names)}
    cells = []
    for row in rows:
        cells.append([])
        for index in row:
            image_name = embeddings.names[index]
            try:
                image, _ = read_thumbnail(images.dataset, places[image_name])
            except KeyError:
                raise InputError(f'data_dir: has no {image_name}, which is in `embeddings`') from None
            except UNREADABLE:
                continue
            label = os.path.basename(image_name)
            if index != row[0]:
                label = f'{torch.cosine_similarity(*embeddings.features[[row[0], index]], dim=0):.3f}\n{label}'
            cells[-1].append((image, label, None))
    cells = [row for row in cells if row]
    if cells:
        save_retrieval_grid(cells, os.path.join(args.output, name), titles=titles)


def main(argv=None):
    args = parser.parse(argv)
    if args.embeddings and (args.pixels or args.model or args.checkpoint):
        raise InputError(f'embeddings={args.embeddings}: takes the place of `model`, `checkpoint` and `pixels`')
    process = start_evaluation(args.device, args.seed, args.output)
    embeddings, images = read(args) if args.embeddings else compute(args, process)
    names = embeddings.names
    if len(names) < 2:
        raise InputError(f"{'embeddings' if args.embeddings else 'data_dir'}: neighbours need at least two images")

    end_process(process)
    if process.primary:
        features = embeddings.features.to(process.device)
        with checking('embeddings' if args.embeddings else 'model', None, ValueError):  # features that are not finite
            found = find_neighbours(features, args.k, args.threshold)
        clusters = cluster_pairs(found.pairs, len(names))
        distances, outliers = mahalanobis_distances(features).sort(descending=True)
        with checking('output', args.output, OSError):
            write_tables(args.output, names, found, clusters, outliers, distances)
            if images:
                nearest = torch.cat([torch.arange(len(names))[:, None], found.indices[:, :8]], dim=1).tolist()
                shown = torch.randperm(len(names), generator=torch.Generator().manual_seed(args.seed))[:args.rows]
                for rows, name, titles in (
                        ([nearest[i] for i in shown], 'retrieval.png', ('query', 'nearest →')),
                        ([cluster[:9] for cluster in clusters[:args.rows]], 'duplicates.png', ('one of', 'cluster →')),
                        ([nearest[i] for i in outliers[:args.rows]], 'outliers.png', ('outlier', 'nearest →'))):
                    save_grid(args, images, embeddings, rows, name, titles)
        _logger.info(
            f'{args.output}: {len(names)} images, {len(found.pairs)} pairs of near-duplicates in {len(clusters)} '
            f'clusters, strongest outlier {names[outliers[0]]}')
    return 0


if __name__ == '__main__':
    sys.exit(parser.run(main))
