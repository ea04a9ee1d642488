#!/usr/bin/env python3
"""Fine-tune a whole backbone with few labels, by the paper's recipes for 1 % and 10 %.

    python eval_semisup.py --model local-dir:output/train/RUN/export --data-dir images/ --percent 10
    python eval_semisup.py -c configs/eval_semisup_1percent.yaml --data-dir imagenet/ --label-list 1percent.txt
"""
import hashlib
import logging
import math
import os
import sys
import time

os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # before torch is loaded, see timm_cgh/__init__.py

import torch
from timm.scheduler import MultiStepLRScheduler
from torch.utils.data import Subset

from timm_cgh.arguments import (
    Parser, add_evaluation_arguments, add_training_arguments, arguments_of, at_least_one, non_negative, positive)
from timm_cgh.data import open_dataset, read_labels
from timm_cgh.data.views import check_range
from timm_cgh.distributed import end_process
from timm_cgh.errors import InputError, checking
from timm_cgh.eval import FeatureExtractor
from timm_cgh.eval.backbone import load_backbone
from timm_cgh.eval.checkpoint import Recorder, find_state
from timm_cgh.eval.classifier import export_classifier, top_accuracy
from timm_cgh.eval.crops import CropLoader
from timm_cgh.eval.datasets import open_labelled_datasets
from timm_cgh.eval.fine_tuning import FineTuning, create_classifier
from timm_cgh.eval.results import describe_accuracy, describe_images, describe_model, write_results
from timm_cgh.eval.semisup import balanced_subset, listed_subset, param_groups
from timm_cgh.eval.start import start_evaluation
from timm_cgh.plots.evaluation import save_classification

_logger = logging.getLogger('eval')

parser = Parser(__doc__)
add_evaluation_arguments(parser)
group = parser.add_argument_group('Semi-supervised fine-tuning (defaults: paper Sec. 4.3)')
group.add_argument('--percent', type=positive, metavar='P',
                   help='percent of the training images that are labelled, equally many of each class; default: by '
                        '--label-list')
group.add_argument('--label-list', metavar='FILE',
                   help='file of names of the labelled images, one per line; default: by --percent')
group.add_argument('--lr-head', type=positive, metavar='X',
                   help='learning rate of the classifier, per 256 images (scaled linearly); default: 0.5 up to 1 '
                        'percent, else 0.2')
group.add_argument('--lr', type=non_negative, metavar='X',
                   help='learning rate of the backbone; default: 1e-4 up to 1 percent, else 2e-4')
group.add_argument('--epochs', type=at_least_one, default=50, metavar='N', help='epochs to train')
group.add_argument('--decay-milestones', type=at_least_one, nargs='+', metavar='N',
                   help='epochs at which the rates fall; default: at 60 and 80 percent of the run, the 30 and 40 of 50')
group.add_argument('--decay-rate', type=positive, default=0.1, metavar='X',
                   help='factor of the learning rates at each milestone')
group.add_argument('--no-sync-bn', action='store_true', help='batch statistics of each GPU by itself')
add_training_arguments(group)


def choose_settings(args):
    """Check the options, and take from the paper's recipes what is not given."""
    if args.percent is None and args.label_list is None:
        raise InputError('percent: say which images are labelled, by it or by `label_list`')
    if args.percent is not None and args.percent > 100:
        raise InputError(f'percent={args.percent:g}: must be at most 100')
    check_range('scale', args.scale)
    if args.percent is None and None in (args.lr, args.lr_head):
        raise InputError(
            f'label_list={args.label_list}: needs `lr` and `lr_head`, or `percent` 1 or 10 for those of the paper')
    few = args.percent is not None and args.percent <= 1
    if args.lr_head is None:
        args.lr_head = 0.5 if few else 0.2
    if args.lr is None:
        args.lr = 1e-4 if few else 2e-4
    if args.decay_milestones is None:
        args.decay_milestones = [max(1, args.epochs * 3 // 5), max(1, args.epochs * 4 // 5)]
    args.decay_milestones = sorted(set(args.decay_milestones))  # timm's schedule misreads any other order


def choose_labelled(args, dataset):
    """Indices of the images whose labels are used."""
    if args.label_list:
        return listed_subset(dataset, args.label_list)
    with checking('percent', args.percent, ValueError):
        return balanced_subset(read_labels(dataset), args.percent / 100, args.seed)


def resume_settings(args, process, backbone, data, chosen):
    """What a run must have in common with the checkpoint that it resumes."""
    return dict(
        model=backbone.digest,
        images=hashlib.sha256(chosen.tobytes()).hexdigest(),
        lr=args.lr,
        lr_head=args.lr_head,
        epochs=args.epochs,
        decay_milestones=args.decay_milestones,
        batch_size=args.batch_size * process.world_size,
        seed=args.seed,
        num_classes=data.num_classes,
        optimization=(args.momentum, args.weight_decay, args.decay_rate),
        augmentation=(*args.scale, args.hflip),
        input=backbone.data_config,
    )


def create_tuning(args, backbone, data, images, extractor):
    """The classifier with its optimiser and schedule."""
    process = extractor.process
    # batch norm cannot train on a single image
    loader = CropLoader(images, backbone.data_config, process, least=2, **arguments_of(CropLoader, args))
    classifier = create_classifier(
        backbone, data.num_classes, extractor, **arguments_of(create_classifier, args))
    scaling = args.batch_size * process.world_size / 256
    optimizer = torch.optim.SGD(
        param_groups(classifier, args.lr * scaling, args.lr_head * scaling),
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=True,
    )
    # timm decays one epoch before a milestone
    scheduler = MultiStepLRScheduler(
        optimizer, decay_t=[epoch + 1 for epoch in args.decay_milestones], decay_rate=args.decay_rate)
    return FineTuning(classifier, loader, extractor, optimizer, scheduler, **arguments_of(FineTuning, args))


def report(args, backbone, data, classifier, images, logits, labels, seconds):
    """Write plots, the classifier and the results; `images`: how many labelled ones were used, of how many."""
    if args.output:
        export_classifier(
            classifier, os.path.join(args.output, 'export'), backbone.data_config, 'semisup', data.class_names)
        save_classification(args.output, labels, logits.argmax(dim=1), data.class_names)
    write_results(dict(
        **describe_model(backbone, args.dataset, args.data_dir, args.val_split),
        protocol='semi-supervised',
        **describe_accuracy(*top_accuracy(logits, labels)),
        percent=round(100 * images[0] / len(data.train), 4),
        lr=args.lr,
        lr_head=args.lr_head,
        epochs=args.epochs,
        **describe_images(backbone.data_config, data.num_classes, images, (len(labels), len(data.val))),
        seconds=round(seconds, 1),
    ), args.results_file)


def main(argv=None):
    args = parser.parse(argv)
    choose_settings(args)
    process = start_evaluation(**arguments_of(start_evaluation, args))

    backbone = load_backbone(**arguments_of(load_backbone, args))
    data = open_labelled_datasets(
        backbone.data_config, args.train_split, args.val_split, **arguments_of(open_dataset, args))
    chosen = choose_labelled(args, data.train)
    settings = resume_settings(args, process, backbone, data, chosen)
    state = find_state(args.output, args.resume, settings)
    start_epoch = 0 if state is None else state['epoch']

    extractor = FeatureExtractor(backbone.data_config, process, **arguments_of(FeatureExtractor, args))
    images = Subset(data.train, chosen.tolist())
    images = Subset(images, extractor.find_readable(images).tolist())
    tuning = create_tuning(args, backbone, data, images, extractor)
    if state is not None:
        tuning.load_state_dict(state)
    recorder = Recorder(args.output if process.primary else None, settings, start_epoch)
    _logger.info(
        f'{backbone.name}: {len(images)} of {len(data.train)} images labelled, {data.num_classes} classes, '
        f'{len(data.val)} validation images, lr {args.lr:g} and {args.lr_head:g} (head), {args.epochs} epochs on '
        f'{process.device}')

    began, outputs = time.monotonic(), None
    for row, found in tuning.run(data.val, start_epoch):
        if not math.isfinite(row['train_loss']):
            _logger.error(f"The loss is not finite in epoch {row['epoch']}: lower --lr-head, --lr may help")
            end_process(process)
            return 1
        if found:
            outputs = found
            _logger.info(f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, top-1 {row['eval_top1']:.2f} %")
        recorder.add(row, found is not None, **tuning.state_dict())

    outputs = outputs or tuning.evaluate(data.val)  # None: a finished run, resumed
    end_process(process)
    if process.primary:
        report(
            args, backbone, data, tuning.classifier, (len(images), len(chosen)), outputs.features, outputs.labels,
            time.monotonic() - began)
    return 0


if __name__ == '__main__':
    sys.exit(parser.run(main))
