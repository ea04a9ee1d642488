#!/usr/bin/env python3
"""Write the embeddings of images: a file of one row per image, with the images' names. A run that was stopped goes on
where it was when it is started again.

    python embed.py --model local-dir:output/train/RUN/export --data-dir images/ --output embeddings.parquet
    python embed.py --model hf-hub:OWNER/NAME --dataset hfds/OWNER/DATA --split train --output embeddings.csv
    torchrun --nproc_per_node 8 embed.py --model resnet50 --data-dir images.tar --output embeddings.npy
"""
import hashlib
import json
import logging
import os
import sys

from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.apply.embeddings import Parts, check_output, join_parts
from timm_cgh.apply.images import find_unreadable, open_images
from timm_cgh.arguments import Parser, add_image_arguments, add_model_arguments, arguments_of, at_least_one
from timm_cgh.data import open_dataset
from timm_cgh.distributed import broadcast_object, end_process
from timm_cgh.eval import FeatureExtractor
from timm_cgh.eval.backbone import load_backbone
from timm_cgh.eval.loader import eval_crop_pct
from timm_cgh.eval.start import start_evaluation

_logger = logging.getLogger('eval')

parser = Parser(__doc__)
add_image_arguments(parser)
add_model_arguments(parser, results=False)
group = parser.add_argument_group('Output')
group.add_argument('-o', '--output', metavar='FILE', required=True,
                   help='file to write, .parquet, .csv, .npy or .safetensors; names of unreadable images go '
                        'to FILE.unreadable.txt')
group.add_argument('--overwrite', action='store_true', help='replace a finished FILE')
group.add_argument('--part-size', type=at_least_one, default=4096, metavar='N',
                   help='images per part in FILE.parts, of which a killed run loses one per process')


def describe_settings(args, backbone):
    """What the parts of one output have in common."""
    # names of images are relative to their folder, and the tables may hold several columns of images
    paths = [os.path.realpath(args.data_dir or ''), args.image_list and os.path.realpath(args.image_list)]
    source = json.dumps([args.dataset, args.split, args.input_key, *paths])
    return dict(
        model=backbone.name,
        weights=backbone.digest,
        input=backbone.data_config,
        crop_pct=eval_crop_pct(min(backbone.data_config['input_size'][1:])),
        precision=args.amp_dtype if args.amp else 'float32',
        source=hashlib.sha256(source.encode()).hexdigest(),  # not the paths: the finished file may be given away
        decoding=[args.pixel_range, args.max_pixels, args.exif_orientation],
    )


def embed(extractor, model, images, indices, parts):
    """Write the embeddings of the images at `indices`, this process's share of them, in parts of whole batches."""
    for features, found, batch in extractor.iterate(model, images.dataset, indices):
        unreadable = find_unreadable(images, found.tolist(), batch.tolist())
        parts.add(features, [images.names[index] for index in found], unreadable)
    parts.flush()


def main(argv=None):
    args = parser.parse(argv)
    process = start_evaluation(args.device, args.seed)
    check_output(args.output, args.overwrite)

    backbone = load_backbone(**arguments_of(load_backbone, args))
    images = open_images(backbone.data_config, image_list=args.image_list, **arguments_of(open_dataset, args))
    parts = Parts(f'{args.output}.parts', images.names, describe_settings(args, backbone), args.part_size)
    remaining = broadcast_object(parts.remaining())  # rank 0's, before another rank has written a part
    done = len(images.names) - len(remaining)
    _logger.info(
        f'{backbone.name}: {len(images.names)} images'
        f"{f', {done} of them done before' if done else ''}, on {process.device}")

    extractor = FeatureExtractor(backbone.data_config, process, **arguments_of(FeatureExtractor, args))
    model = extractor.prepare(backbone.model)
    with logging_redirect_tqdm():
        embed(extractor, model, images, remaining, parts)

    end_process(process)
    if process.primary:
        parts.scan()
        _logger.info(join_parts(parts, args.output))
    return 0


if __name__ == '__main__':
    sys.exit(parser.run(main))
