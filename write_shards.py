#!/usr/bin/env python3
"""Write images as WebDataset shards, from which train.py streams: the files as they are, with their names and classes,
in random order.

    python write_shards.py --data-dir photos/ --output shards/
    python train.py --dataset wds/ --data-dir shards/ --model resnet50
"""
import logging
import os
import sys

from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.apply.images import find_unreadable, open_images, write_unreadable
from timm_cgh.apply.shards import read_index, write_shards
from timm_cgh.arguments import (
    Parser, add_config_argument, add_image_arguments, arguments_of, at_least_one, natural, positive, random_seed)
from timm_cgh.data import open_dataset, read_labels
from timm_cgh.distributed import end_process
from timm_cgh.eval import FeatureExtractor
from timm_cgh.eval.start import start_evaluation

_logger = logging.getLogger('data')

parser = Parser(__doc__)
add_config_argument(parser)
add_image_arguments(parser, split='train')
parser.add_argument('--in-chans', metavar='N', type=at_least_one, default=3,
                    help='3 (colour), 1 (grey) or number of bands, without which an image counts as unreadable')
parser.add_argument('-j', '--workers', metavar='N', type=natural, default=min(4, os.cpu_count() or 1),
                    help='processes that check whether images are readable')
group = parser.add_argument_group('Output')
group.add_argument('-o', '--output', metavar='DIR', required=True,
                   help='folder for the shards of the split and _info.json; names of unreadable images go to '
                        'SPLIT.unreadable.txt in it')
group.add_argument('--shard-images', type=at_least_one, default=1000, metavar='N',
                   help='images in a shard, at most; all processes of a training together can have as many workers as '
                        'there are shards')
group.add_argument('--shard-mb', type=positive, default=1000, metavar='MB', help='approximate largest size of a shard')
group.add_argument('--seed', type=random_seed, default=42, metavar='N', help='seed of the order')


def main(argv=None):
    args = parser.parse(argv)
    process = start_evaluation('cpu', args.seed)
    chans = args.in_chans
    config = dict(input_size=(chans, 8, 8), mean=(0.5,) * chans, std=(0.5,) * chans, interpolation='bilinear')
    source = {**arguments_of(open_dataset, args), 'split': None if args.image_list else args.split}
    images = open_images(config, image_list=args.image_list, **source)
    read_index(images, args.output, args.split)  # what is wrong shows before hours of reading
    with logging_redirect_tqdm():
        readable = FeatureExtractor(config, process, workers=args.workers).find_readable(images.dataset)

    end_process(process)
    if process.primary:
        entry = write_shards(images, readable, **arguments_of(write_shards, args))
        unreadable = write_unreadable(
            os.path.join(args.output, args.split), find_unreadable(images, readable.tolist()))
        labels = read_labels(images.dataset)
        classes = '' if labels is not None and (labels >= 0).any() else ', without classes'
        _logger.info(
            f"{args.output}: {entry['num_samples']} images of {args.split} in {len(entry['filenames'])} shards"
            f'{classes}{unreadable}')
    return 0


if __name__ == '__main__':
    sys.exit(parser.run(main))
