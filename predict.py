#!/usr/bin/env python3
"""Classify new images: a file of their most probable classes, by name.

    python predict.py --model local-dir:output/finetune/export --data-dir new/ --output predictions.csv
    python predict.py --model resnet50.a1_in1k --data-dir photo.jpg --output predictions.json --top 3
"""
import logging
import sys

from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.apply.images import find_unreadable, open_images, write_unreadable
from timm_cgh.apply.predictions import ENDINGS, TopClasses, load_classifier, write_predictions
from timm_cgh.arguments import (
    Parser, add_config_argument, add_image_arguments, add_run_arguments, arguments_of, at_least_one)
from timm_cgh.data import open_dataset
from timm_cgh.distributed import end_process
from timm_cgh.eval import FeatureExtractor
from timm_cgh.eval.start import start_evaluation
from timm_cgh.files import check_file

_logger = logging.getLogger('eval')

parser = Parser(__doc__)
add_config_argument(parser)
add_image_arguments(parser)
group = parser.add_argument_group('Model')
group.add_argument('--model', metavar='NAME', required=True,
                   help='classifier, local-dir:OUTPUT/export of finetune.py, hf-hub:OWNER/NAME or a model of timm')
group.add_argument('--img-size', nargs='+', metavar='PX', type=at_least_one,
                   help="side of the images, or height and width; default: the model's")
add_run_arguments(parser, results=False)
group = parser.add_argument_group('Output')
group.add_argument('-o', '--output', metavar='FILE', required=True,
                   help='file to write, .csv, .json or .jsonl; names of unreadable images go to '
                        'FILE.unreadable.txt')
group.add_argument('--top', type=at_least_one, default=5, metavar='N',
                   help='most probable classes to write, all where there are fewer')


def main(argv=None):
    args = parser.parse(argv)
    process = start_evaluation(args.device, args.seed)
    check_file(args.output, 'output', ENDINGS)

    classifier = load_classifier(args.model, args.img_size)
    images = open_images(classifier.data_config, image_list=args.image_list, **arguments_of(open_dataset, args))
    _logger.info(
        f'{args.model}: {len(images.names)} images, {len(classifier.names)} classes, on {process.device}')

    extractor = FeatureExtractor(classifier.data_config, process, **arguments_of(FeatureExtractor, args))
    model = extractor.prepare(TopClasses(classifier.model, min(args.top, len(classifier.names))))
    with logging_redirect_tqdm():
        found = extractor(model, images.dataset)

    end_process(process)
    if process.primary:
        names = [images.names[index] for index in found.indices]
        write_predictions(args.output, names, found.features, classifier.names)
        unreadable = write_unreadable(args.output, find_unreadable(images, found.indices.tolist()))
        _logger.info(f'{args.output}: predictions for {len(names)} images{unreadable}')
    return 0


if __name__ == '__main__':
    sys.exit(parser.run(main))
