#!/usr/bin/env python3
"""Fine-tune a whole backbone on labelled images: the result is one timm classifier, OUTPUT/export, that of the best
epoch by validation top-1.

    python finetune.py --model local-dir:output/train/RUN/export --data-dir labelled/ --output output/finetune
    python finetune.py --model vit_small_patch16_224.dino --data-dir imagenet/ --layer-decay 0.65 --output output/vit
    torchrun --nproc_per_node 8 finetune.py --checkpoint moco.pth.tar --model resnet50 --data-dir imagenet/ -b 128 ...
"""
import logging
import math
import os
import sys
import time

os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # before torch is loaded, see timm_cgh/__init__.py

from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import Subset

from timm_cgh.arguments import (
    Parser, add_evaluation_arguments, add_training_arguments, arguments_of, at_least_one, fraction, natural, positive)
from timm_cgh.data import open_dataset
from timm_cgh.data.views import check_range
from timm_cgh.distributed import end_process
from timm_cgh.errors import InputError, checking, redact
from timm_cgh.eval import FeatureExtractor
from timm_cgh.eval.backbone import load_backbone
from timm_cgh.eval.checkpoint import Recorder, find_state
from timm_cgh.eval.classifier import export_classifier
from timm_cgh.eval.crops import CropLoader
from timm_cgh.eval.datasets import open_labelled_datasets
from timm_cgh.eval.fine_tuning import FineTuning, create_classifier
from timm_cgh.eval.results import describe_accuracy, describe_images, describe_model, write_results
from timm_cgh.eval.start import start_evaluation
from timm_cgh.files import write_yaml
from timm_cgh.models.checkpoints import weights_digest
from timm_cgh.plots.evaluation import save_classification

_logger = logging.getLogger('eval')

parser = Parser(__doc__)
add_evaluation_arguments(parser, hold_out=True)
group = parser.add_argument_group('Fine-tuning')
group.add_argument('--epochs', type=at_least_one, default=50, metavar='N',
                   help='passes over the training images')
group.add_argument('--opt', default='adamw', metavar='NAME', help="timm's optimizer")
group.add_argument('--lr', type=positive, default=5e-4, metavar='X',
                   help='peak learning rate of the classifier, not scaled by the batch')
group.add_argument('--layer-decay', type=fraction, default=0.75, metavar='X',
                   help='factor of the learning rate from each layer to the one before it, 1 for equal rates')
group.add_argument('--warmup-epochs', type=natural, metavar='N',
                   help='epochs of linear warm-up before the cosine decay; default: a tenth of --epochs')
group.add_argument('--smoothing', type=fraction, default=0.1, metavar='X',
                   help='label smoothing')
group.add_argument('--no-sync-bn', action='store_true',
                   help='keep the batch statistics of each GPU apart')
add_training_arguments(group)
parser.set_defaults(batch_size=32, weight_decay=0.05, val_interval=1)


def choose_settings(args):
    """Check the options, and choose what is not given."""
    if not args.output:
        raise InputError('output: say where the classifier goes')
    check_range('scale', args.scale)
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs // 10
    if args.warmup_epochs >= args.epochs:
        raise InputError(f'warmup_epochs={args.warmup_epochs}: must be below `epochs`, {args.epochs}')


def resume_settings(args, process, backbone, data):
    """What a run must have in common with the checkpoint that it resumes."""
    return dict(
        model=backbone.digest,
        images=(len(data.train), len(data.val)),
        num_classes=data.num_classes,
        epochs=args.epochs,
        batch_size=args.batch_size * process.world_size,
        seed=args.seed,
        optimization=(
            args.opt, args.lr, args.layer_decay, args.warmup_epochs, args.momentum, args.weight_decay, args.smoothing),
        augmentation=(*args.scale, args.hflip),
        input=backbone.data_config,
    )


def create_tuning(args, backbone, data, images, extractor):
    """The classifier with its optimiser and schedule."""
    # batch norm cannot train on a single image
    loader = CropLoader(images, backbone.data_config, extractor.process, least=2, **arguments_of(CropLoader, args))
    classifier = create_classifier(
        backbone, data.num_classes, extractor, **arguments_of(create_classifier, args))
    with checking('opt', args.opt, AssertionError, ValueError):
        optimizer = create_optimizer_v2(
            classifier,
            opt=args.opt,
            lr=args.lr,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay,
        )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        'cosine',
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    return FineTuning(classifier, loader, extractor, optimizer, scheduler, **arguments_of(FineTuning, args))


def train(args, backbone, data, tuning, recorder, start_epoch, best):
    """Train the epochs that are left and export the classifier of the best.

    Returns:
        what the report needs of that epoch; None where training diverged
    """
    for row, outputs in tuning.run(data.val, start_epoch):
        if not math.isfinite(row['train_loss']):
            _logger.error(f"The loss is not finite in epoch {row['epoch']}: a lower --lr may help")
            return None
        if outputs:
            better = best is None or row['eval_top1'] > best['top1']
            _logger.info(
                f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, top-1 {row['eval_top1']:.2f} %"
                f"{' (best)' if better else ''}")
            if better:
                best = dict(
                    epoch=row['epoch'], top1=row['eval_top1'], top5=row['eval_top5'], labels=outputs.labels,
                    predictions=outputs.features.argmax(dim=1))
                if recorder.output:
                    export_classifier(
                        tuning.classifier, os.path.join(args.output, 'export'), backbone.data_config, 'finetune',
                        data.class_names)
                    best['classifier'] = weights_digest(tuning.classifier)  # publish.py compares it
        recorder.add(row, outputs is not None, **tuning.state_dict(), best=best)
    return best


def report(args, backbone, data, images, best, seconds):
    """Write plots and results; `images`: how many training images were used."""
    save_classification(args.output, best['labels'], best['predictions'], data.class_names)
    write_results(dict(
        **describe_model(backbone, args.dataset, args.data_dir, data.val_split),
        protocol='fine-tuned',
        **describe_accuracy(best['top1'], best['top5']),
        classifier=best.get('classifier'),
        epoch=best['epoch'],
        epochs=args.epochs,
        lr=args.lr,
        layer_decay=args.layer_decay,
        **describe_images(
            backbone.data_config, data.num_classes, (images, len(data.train)), (len(best['labels']), len(data.val))),
        seconds=round(seconds, 1),
    ), args.results_file)


def main(argv=None):
    args = parser.parse(argv)
    choose_settings(args)
    process = start_evaluation(**arguments_of(start_evaluation, args))

    backbone = load_backbone(**arguments_of(load_backbone, args))
    data = open_labelled_datasets(
        backbone.data_config, args.train_split, args.val_split, **arguments_of(open_dataset, args))
    settings = resume_settings(args, process, backbone, data)
    state = find_state(args.output, args.resume, settings)
    start_epoch, best = (0, None) if state is None else (state['epoch'], state['best'])
    if process.primary:
        write_yaml(os.path.join(args.output, 'args.yaml'), redact(vars(args)))  # predict.py decodes images as it says

    extractor = FeatureExtractor(backbone.data_config, process, **arguments_of(FeatureExtractor, args))
    images = Subset(data.train, extractor.find_readable(data.train).tolist())
    tuning = create_tuning(args, backbone, data, images, extractor)
    if state is not None:
        tuning.load_state_dict(state)
    recorder = Recorder(args.output if process.primary else None, settings, start_epoch)
    _logger.info(
        f'{backbone.name}: {len(images)} training images of {data.num_classes} classes, {len(data.val)} validation '
        f'images ({data.val_split}), {args.epochs} epochs on {process.device}')

    began = time.monotonic()
    best = train(args, backbone, data, tuning, recorder, start_epoch, best)
    end_process(process)
    if best and process.primary:
        report(args, backbone, data, len(images), best, time.monotonic() - began)
    return 0 if best else 1


if __name__ == '__main__':
    sys.exit(parser.run(main))
