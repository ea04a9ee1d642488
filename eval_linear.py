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

# On a CPU, OpenMP threads that wait for each other spin; beside data workers they would starve one another.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch
import torch.distributed as dist
from timm import utils
from timm.scheduler import CosineLRScheduler
from torch.nn.parallel import DistributedDataParallel
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.arguments import Parser, at_least_one, fraction, natural, non_negative, positive
from timm_cgh.errors import InputError
from timm_cgh.eval import eval_crop_pct
from timm_cgh.eval.classifier import as_classifier, class_names, export_classifier, find_state, save_state
from timm_cgh.eval.crops import CropLoader
from timm_cgh.eval.features import pooled_features
from timm_cgh.eval.linear import FeatureLoader, LinearHeads, best_head, evaluate_heads, losses_of
from timm_cgh.eval.pictures import save_class_accuracy, save_confusion
from timm_cgh.eval.setup import (
    add_common_arguments, check_classes, end_run, extract_distributed, init_run, load_backbone, open_labelled,
    what_is_judged, write_results)
from timm_cgh.models.weights import weights_digest
from timm_cgh.progress import Progress
from timm_cgh.summary import Summary

_logger = logging.getLogger('eval')

parser = Parser(description='Linear classification on a frozen backbone')
add_common_arguments(parser)
group = parser.add_argument_group('Linear classification')
group.add_argument('--lr', nargs='+', type=positive, default=[0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0], metavar='X',
                   help='one head each, for 256 images a step (scaled); the paper: 3.0 on small data, 0.3 on IN-1K')
group.add_argument('--epochs', type=at_least_one, default=100, metavar='N')
group.add_argument('--momentum', type=fraction, default=0.9, metavar='M')
group.add_argument('--weight-decay', type=non_negative, default=0.0, metavar='X')
group.add_argument('--cache-features', action='store_true',
                   help='take the features once, from centre crops without augmentation, and train on those')
group.add_argument('--scale', nargs=2, type=positive, default=[0.08, 1.0], metavar=('MIN', 'MAX'), help='crop area')
group.add_argument('--hflip', type=fraction, default=0.5, metavar='P')
group.add_argument('--val-interval', type=natural, default=10, metavar='N', help='epochs; 0: at the end only')
group.add_argument('--log-interval', type=at_least_one, default=50, metavar='N', help='batches')
group.add_argument('--resume', metavar='FILE', help="'auto': the checkpoint in --output, where there is one")


def train_one_epoch(args, epoch, loader, features_of, heads, model, optimizer, scheduler, silent):
    """Returns the mean loss of every head, (heads,)."""
    steps, total, seen = len(loader), 0.0, 0
    progress = Progress(epoch, args.epochs, 0, steps, args.batch_size * args.world_size, silent=silent)
    for batch, (inputs, labels, count) in enumerate(loader.epoch(epoch)):
        losses = losses_of(model(features_of(inputs)), labels)  # (heads,)
        # DDP averages over the processes: each gives its part of the mean over the whole batch
        (losses.sum() * (args.world_size / count)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_update(epoch * steps + batch + 1)
        total, seen = total + losses.detach(), seen + count
        progress.bar.update()
        if (batch + 1) % args.log_interval == 0 or batch + 1 == steps:
            least = total.nan_to_num(nan=float('inf')).min().item()  # of the heads; this process's part of the images
            progress.report(batch + 1, least * args.world_size / seen, optimizer.param_groups[0]['lr'], None)
    progress.bar.close()
    if args.distributed:
        dist.all_reduce(total)
    return (total / seen).tolist()


def main(argv=None):
    args = parser.parse(argv)
    args.lr = sorted(set(args.lr))
    if args.scale[0] > args.scale[1]:
        raise InputError(f'--scale {args.scale[0]:g} {args.scale[1]:g}: the first must not exceed the second')
    device = init_run(args)
    primary = utils.is_primary(args)

    # ---- backbone and data; the validation features are taken once, since the backbone never changes
    backbone, data_config = load_backbone(args)
    train_set, val_set = open_labelled(args, args.train_split), open_labelled(args, args.val_split)
    num_classes = check_classes(train_set, val_set)
    settings = dict(
        model=args.digest,
        lr=args.lr,
        epochs=args.epochs,
        batch_size=args.batch_size * args.world_size,
        seed=args.seed,
        num_classes=num_classes,
        train_images=len(train_set),
        cache_features=args.cache_features,
        optimization=(args.momentum, args.weight_decay),
        augmentation=None if args.cache_features else (*args.scale, args.hflip),
        input=data_config,
    )
    state = find_state(args.output, args.resume, settings)
    backbone.to(device).eval().requires_grad_(False)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    backbone.to(memory_format=layout)
    val_features, val_labels = extract_distributed(backbone, val_set, data_config, args, device)
    common = dict(
        batch_size=args.batch_size,
        device=device,
        seed=args.seed,
        rank=args.rank,
        world_size=args.world_size,
    )
    if args.cache_features:
        loader = FeatureLoader(*extract_distributed(backbone, train_set, data_config, args, device), **common)

        def features_of(features):
            return features
    else:
        loader = CropLoader(
            train_set, data_config, workers=args.workers, scale=args.scale, hflip=args.hflip, **common)
        amp_dtype = getattr(torch, args.amp_dtype) if args.amp else None

        @torch.no_grad()
        def features_of(images):
            return pooled_features(backbone, images.to(memory_format=layout), amp_dtype)

    # ---- heads and optimisation
    scaling = args.batch_size * args.world_size / 256
    heads = LinearHeads(val_features.shape[1], num_classes, args.lr, seed=args.seed).to(device)
    groups = [dict(group, lr=group['lr'] * scaling) for group in heads.param_groups()]
    optimizer = torch.optim.SGD(groups, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs * len(loader), t_in_epochs=False)
    start_epoch = 0
    if state is not None:
        heads.load_state_dict(state['heads'])
        optimizer.load_state_dict(state['optimizer'])
        start_epoch = state['epoch']
        scheduler.step_update(start_epoch * len(loader))
    model = DistributedDataParallel(heads) if args.distributed else heads
    summary = Summary(os.path.join(args.output, 'summary.csv'), start_epoch) if args.output and primary else None
    if primary:
        _logger.info(
            f"{args.model}: {len(train_set)} images of {num_classes} classes"
            f"{', features taken once' if args.cache_features else ''}, {len(val_set)} to judge by, "
            f"{len(args.lr)} heads, {args.epochs} epochs on {device}")

    # ---- training
    began = saved = time.monotonic()
    results = None
    for epoch in range(start_epoch, args.epochs):
        last = epoch + 1 == args.epochs
        judged = last or (args.val_interval and (epoch + 1) % args.val_interval == 0)
        with logging_redirect_tqdm():
            losses = train_one_epoch(
                args, epoch, loader, features_of, heads, model, optimizer, scheduler,
                silent=not primary or (args.cache_features and not judged))
        if not primary:
            continue
        row = {'epoch': epoch, **{f'train_loss_lr{lr:g}': loss for lr, loss in zip(args.lr, losses)}}
        if judged:
            results = evaluate_heads(heads, val_features, val_labels)
            best = results[best_head(results)]
            row.update({f"eval_top1_lr{r['lr']:g}": round(r['top1'], 4) for r in results})
            _logger.info(f"epoch {epoch}: best head lr {best['lr']:g}, top-1 {best['top1']:.2f} %")
        if summary is not None:
            if judged or time.monotonic() - saved > 60:  # an epoch on features takes less than the writing
                summary.add(row)
                save_state(
                    os.path.join(args.output, 'last.pth.tar'), settings,
                    epoch=epoch + 1, heads=heads.state_dict(), optimizer=optimizer.state_dict())
                saved = time.monotonic()
            else:
                summary.rows.append(row)

    # ---- what it comes to
    backbone.cpu()
    if weights_digest(backbone) != args.digest:
        raise RuntimeError('the frozen backbone has changed')
    if not primary:
        return end_run(args)
    if results is None:  # a finished run, resumed
        results = evaluate_heads(heads, val_features, val_labels)
    place = best_head(results)
    best = results[place]
    for result in results:
        diverged = ' (diverged)' if (result['predictions'] < 0).all() else ''
        _logger.info(f"lr {result['lr']:g}: top-1 {result['top1']:.3f} %, top-5 {result['top5']:.3f} %{diverged}")
    if (best['predictions'] < 0).all():
        _logger.error('Every head has diverged: lower rates (--lr) may help')
        end_run(args)
        return 1
    if len(args.lr) > 1 and place in (0, len(args.lr) - 1):
        _logger.info('The best rate is the %s of those tried (--lr)', 'largest' if place else 'smallest')
    size = min(data_config['input_size'][1:])
    protocol = 'linear, cached features' if args.cache_features else 'linear'
    report = dict(
        **what_is_judged(args),
        protocol=protocol,
        top1=round(best['top1'], 4),
        top1_err=round(100 - best['top1'], 4),
        top5=round(best['top5'], 4),
        top5_err=round(100 - best['top5'], 4),
        lr=best['lr'],
        heads={f"{r['lr']:g}": dict(top1=round(r['top1'], 4), top5=round(r['top5'], 4)) for r in results},
        epochs=args.epochs,
        num_classes=num_classes,
        train_images=len(train_set),
        val_images=len(val_labels),
        img_size=size,
        crop_pct=eval_crop_pct(size),
        interpolation=data_config['interpolation'],
        seconds=round(time.monotonic() - began, 1),
    )
    if args.output:
        names = class_names(train_set, num_classes)
        save_confusion(val_labels, best['predictions'], os.path.join(args.output, 'confusion.png'), names)
        save_class_accuracy(val_labels, best['predictions'], os.path.join(args.output, 'classes.png'), names)
        try:
            classifier = as_classifier(backbone, heads.weights[place], heads.biases[place], data_config)
        except ValueError as error:
            _logger.warning(f'No export: {error}; the heads are in last.pth.tar')
        else:
            export_classifier(classifier, os.path.join(args.output, 'export'), data_config, 'linear', names)
    write_results(args, report)
    return end_run(args)


def cli(argv=None):
    return parser.run(main, argv)


if __name__ == '__main__':
    sys.exit(cli())
