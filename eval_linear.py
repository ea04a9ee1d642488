#!/usr/bin/env python3
"""Linear classification on a frozen backbone: several learning rates in one pass, the paper's protocols by --config.

    python eval_linear.py --model local-dir:output/train/RUN/export --data-dir images/ --output output/linear
    python eval_linear.py -c configs/eval_linear_imagenet.yaml --model cgh_resnet50 --data-dir imagenet/
    python eval_linear.py --model hf-hub:OWNER/NAME --data-dir images/ --cache-features      # heads in seconds
"""
import logging
import os
import sys
import time

os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # before torch is loaded, see timm_cgh/__init__.py

import torch
import torch.distributed as dist
from timm.scheduler import CosineLRScheduler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.arguments import (
    Parser, add_evaluation_arguments, add_training_arguments, arguments_of, at_least_one, positive)
from timm_cgh.data import open_dataset
from timm_cgh.data.views import check_range
from timm_cgh.distributed import end_process
from timm_cgh.eval import FeatureExtractor
from timm_cgh.eval.backbone import load_backbone
from timm_cgh.eval.checkpoint import Recorder, find_state
from timm_cgh.eval.classifier import as_classifier, export_classifier
from timm_cgh.eval.crops import CropLoader
from timm_cgh.eval.datasets import open_labelled_datasets
from timm_cgh.eval.linear import FeatureLoader, LinearHeads, best_head, evaluate_heads, head_losses
from timm_cgh.eval.results import describe_accuracy, describe_images, describe_model, write_results
from timm_cgh.eval.start import start_evaluation
from timm_cgh.plots.evaluation import save_classification
from timm_cgh.progress import Progress

_logger = logging.getLogger('eval')

parser = Parser(__doc__)
add_evaluation_arguments(parser)
group = parser.add_argument_group('Linear classification')
group.add_argument('--lr', nargs='+', type=positive, default=[0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0], metavar='X',
                   help='learning rates, one head each, per 256 images (scaled linearly); the paper: 3.0 on small '
                        'data, 0.3 on IN-1K')
group.add_argument('--epochs', type=at_least_one, default=100, metavar='N', help='epochs to train')
group.add_argument('--cache-features', action='store_true',
                   help='extract the features once, from centre crops without augmentation, and train on those')
add_training_arguments(group)


def resume_settings(args, process, backbone, data):
    """What a run must have in common with the checkpoint that it resumes."""
    return dict(
        model=backbone.digest,
        lr=args.lr,
        epochs=args.epochs,
        batch_size=args.batch_size * process.world_size,
        seed=args.seed,
        num_classes=data.num_classes,
        train_images=len(data.train),
        cache_features=args.cache_features,
        optimization=(args.momentum, args.weight_decay),
        augmentation=None if args.cache_features else (*args.scale, args.hflip),
        input=backbone.data_config,
    )


def create_optimizer(args, heads, steps, world_size, state):
    """SGD and its cosine schedule; they and the heads go on from `state`, where there is one."""
    scaling = args.batch_size * world_size / 256
    groups = [dict(group, lr=group['lr'] * scaling) for group in heads.param_groups()]
    optimizer = torch.optim.SGD(groups, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs * steps, t_in_epochs=False)
    if state is not None:
        heads.load_state_dict(state['heads'])
        optimizer.load_state_dict(state['optimizer'])
        scheduler.step_update(state['epoch'] * steps)
    return optimizer, scheduler


def train_one_epoch(args, epoch, loader, backbone, extractor, heads, optimizer, scheduler, silent):
    """Returns the mean loss of every head, (heads,)."""
    process, steps, total, seen = extractor.process, len(loader), 0.0, 0
    progress = Progress(epoch, args.epochs, 0, steps, args.batch_size * process.world_size, silent=silent)
    for batch, (inputs, labels, count) in enumerate(progress.waiting(loader.epoch(epoch))):
        features = inputs if args.cache_features else extractor.batch_features(backbone.model, inputs)
        losses = head_losses(heads(features), labels)  # (heads,)
        # DDP averages over the processes: each gives its part of the mean over the whole batch
        (losses.sum() * (process.world_size / count)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_update(epoch * steps + batch + 1)
        total, seen = total + losses.detach(), seen + count
        progress.bar.update()
        if (batch + 1) % args.log_interval == 0 or batch + 1 == steps:
            least = total.nan_to_num(nan=float('inf')).min().item()  # of the heads; of this process's images
            progress.report(batch + 1, least * process.world_size / seen, optimizer.param_groups[0]['lr'], None)
    progress.bar.close()
    if process.distributed:
        dist.all_reduce(total)
    return (total / seen).tolist()


def log_heads(results):
    """Log the accuracy of every head, and whether other learning rates should be tried; returns the best."""
    for result in results:
        diverged = ' (diverged)' if result.diverged else ''
        _logger.info(f'lr {result.lr:g}: top-1 {result.top1:.3f} %, top-5 {result.top5:.3f} %{diverged}')
    best = best_head(results)
    if results[best].diverged:
        _logger.error('Every head has diverged: lower rates (--lr) may help')
    elif len(results) > 1 and best in (0, len(results) - 1):
        _logger.info('The best rate is the %s of those tried (--lr)', 'largest' if best else 'smallest')
    return best


def write_files(args, backbone, data, heads, best, predictions, labels):
    """Plots, and the backbone with the best head as a timm model, into `--output`."""
    try:
        classifier = as_classifier(backbone.model, heads.weights[best], heads.biases[best], backbone.data_config)
    except ValueError as error:
        _logger.warning(f'No export: {error}; the heads are in last.pth.tar')
    else:
        export_classifier(
            classifier, os.path.join(args.output, 'export'), backbone.data_config, 'linear', data.class_names)
    save_classification(args.output, labels, predictions, data.class_names)


def report(args, backbone, data, readable, heads, results, labels, seconds):
    """Log and write the results; returns the exit code."""
    best = log_heads(results)
    top = results[best]
    if top.diverged:
        return 1
    if args.output:
        write_files(args, backbone, data, heads, best, top.predictions, labels)
    write_results(dict(
        **describe_model(backbone, args.dataset, args.data_dir, args.val_split),
        protocol='linear, cached features' if args.cache_features else 'linear',
        **describe_accuracy(top.top1, top.top5),
        lr=top.lr,
        heads={f'{r.lr:g}': dict(top1=round(r.top1, 4), top5=round(r.top5, 4)) for r in results},
        epochs=args.epochs,
        **describe_images(
            backbone.data_config, data.num_classes, (len(readable), len(data.train)), (len(labels), len(data.val))),
        seconds=round(seconds, 1),
    ), args.results_file)
    return 0


def main(argv=None):
    args = parser.parse(argv)
    args.lr = sorted(set(args.lr))
    check_range('scale', args.scale)
    process = start_evaluation(**arguments_of(start_evaluation, args))

    backbone = load_backbone(**arguments_of(load_backbone, args))
    data = open_labelled_datasets(
        backbone.data_config, args.train_split, args.val_split, **arguments_of(open_dataset, args))
    settings = resume_settings(args, process, backbone, data)
    state = find_state(args.output, args.resume, settings)
    start_epoch = 0 if state is None else state['epoch']

    extractor = FeatureExtractor(backbone.data_config, process, **arguments_of(FeatureExtractor, args))
    extractor.prepare(backbone.model).requires_grad_(False)
    val = extractor(backbone.model, data.val)  # once: the backbone is frozen
    if args.cache_features:
        features, labels, readable = extractor(backbone.model, data.train)
        loader = FeatureLoader(features, labels, process, **arguments_of(FeatureLoader, args))
    else:
        readable = extractor.find_readable(data.train)
        loader = CropLoader(
            Subset(data.train, readable.tolist()), backbone.data_config, process, **arguments_of(CropLoader, args))
    heads = LinearHeads(val.features.shape[1], data.num_classes, args.lr, seed=args.seed).to(process.device)
    optimizer, scheduler = create_optimizer(args, heads, len(loader), process.world_size, state)
    model = DistributedDataParallel(heads) if process.distributed else heads
    recorder = Recorder(args.output if process.primary else None, settings, start_epoch)
    _logger.info(
        f'{backbone.name}: {len(readable)} training images of {data.num_classes} classes'
        f"{', features extracted once' if args.cache_features else ''}, {len(val.labels)} validation images, "
        f'{len(args.lr)} heads, {args.epochs} epochs on {process.device}')

    began, results = time.monotonic(), None
    for epoch in range(start_epoch, args.epochs):
        evaluate = epoch + 1 == args.epochs or (args.val_interval and (epoch + 1) % args.val_interval == 0)
        with logging_redirect_tqdm():
            losses = train_one_epoch(
                args, epoch, loader, backbone, extractor, model, optimizer, scheduler,
                silent=not process.primary or (args.cache_features and not evaluate))
        row = {'epoch': epoch, **{f'train_loss_lr{lr:g}': loss for lr, loss in zip(args.lr, losses)}}
        if evaluate and process.primary:
            results = evaluate_heads(heads, val.features, val.labels)
            row.update({f'eval_top1_lr{r.lr:g}': round(r.top1, 4) for r in results})
            best = results[best_head(results)]
            _logger.info(f'epoch {epoch}: best head lr {best.lr:g}, top-1 {best.top1:.2f} %')
        recorder.add(row, evaluate, heads=heads.state_dict(), optimizer=optimizer.state_dict())

    code = 0
    end_process(process)
    if process.primary:
        results = results or evaluate_heads(heads, val.features, val.labels)  # None: a finished run, resumed
        code = report(args, backbone, data, readable, heads, results, val.labels, time.monotonic() - began)
    return code


if __name__ == '__main__':
    sys.exit(parser.run(main))
