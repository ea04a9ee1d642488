#!/usr/bin/env python3
"""Fine-tune a whole backbone with few labels, by the paper's recipes for 1 % and 10 %.

    python eval_semisup.py --model local-dir:output/train/RUN/export --data-dir images/ --percent 10
    python eval_semisup.py -c configs/eval_semisup_1percent.yaml --data-dir imagenet/ --label-list 1percent.txt
"""
import hashlib
import logging
import os
import sys
import time

# On a CPU, OpenMP threads that wait for each other spin; beside data workers they would starve one another.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm import utils
from timm.layers import convert_sync_batchnorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import MultiStepLR
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.arguments import Parser, at_least_one, fraction, natural, non_negative, positive
from timm_cgh.data import ImageSubset, image_mode, labels_of
from timm_cgh.errors import InputError, blame
from timm_cgh.eval import eval_crop_pct
from timm_cgh.eval.classifier import (
    as_classifier, class_names, export_classifier, find_state, save_state, top_accuracy)
from timm_cgh.eval.crops import CropLoader
from timm_cgh.eval.linear import LinearHeads
from timm_cgh.eval.pictures import save_class_accuracy, save_confusion
from timm_cgh.eval.semisup import Logits, balanced_subset, listed_subset, param_groups
from timm_cgh.eval.setup import (
    add_common_arguments, check_classes, end_run, extract_distributed, init_run, load_backbone, open_labelled,
    what_is_judged, write_results)
from timm_cgh.optim import fill_momentum, load_optimizer
from timm_cgh.progress import Progress
from timm_cgh.summary import Summary

_logger = logging.getLogger('eval')

parser = Parser(description='Semi-supervised fine-tuning of a backbone')
add_common_arguments(parser)
group = parser.add_argument_group('Semi-supervised fine-tuning (defaults: paper Sec. 4.3)')
group.add_argument('--percent', type=positive, metavar='P',
                   help='of the training images, equally many of each class by --seed; with a list: for the rates')
group.add_argument('--label-list', metavar='FILE', help='names of the labelled images, one per line')
group.add_argument('--lr-head', type=positive, metavar='X',
                   help='for 256 images a step (scaled linearly); default 0.5 up to 1 percent, else 0.2')
group.add_argument('--lr', type=non_negative, metavar='X', 
                   help='of the backbone; default 1e-4 up to 1 percent, else 2e-4')
group.add_argument('--epochs', type=at_least_one, default=50, metavar='N')
group.add_argument('--decay-milestones', type=at_least_one, nargs='+', metavar='N',
                   help='epochs; default at 60 and 80 percent of the run, the 30 and 40 of 50')
group.add_argument('--decay-rate', type=positive, default=0.1, metavar='X')
group.add_argument('--momentum', type=fraction, default=0.9, metavar='M')
group.add_argument('--weight-decay', type=non_negative, default=0.0, metavar='X')
group.add_argument('--no-sync-bn', action='store_true', help='batch statistics of each GPU alone')
group.add_argument('--scale', nargs=2, type=positive, default=[0.08, 1.0], metavar=('MIN', 'MAX'), help='crop area')
group.add_argument('--hflip', type=fraction, default=0.5, metavar='P')
group.add_argument('--val-interval', type=natural, default=10, metavar='N', help='epochs; 0: at the end only')
group.add_argument('--log-interval', type=at_least_one, default=50, metavar='N', help='batches')
group.add_argument('--resume', metavar='FILE', help="'auto': the checkpoint in --output, where there is one")


def choose_settings(args):
    """Refuse what would not be what was meant; choose what was left open by the paper's recipes."""
    if args.percent is None and args.label_list is None:
        raise InputError('--percent or --label-list: say which images are labelled')
    if args.percent is not None and args.percent > 100:
        raise InputError(f'--percent {args.percent:g}: must be at most 100')
    if args.scale[0] > args.scale[1]:
        raise InputError(f'--scale {args.scale[0]:g} {args.scale[1]:g}: the first must not exceed the second')
    if args.percent is None and None in (args.lr, args.lr_head):
        raise InputError(
            f'--label-list {args.label_list}: say --lr and --lr-head, or --percent 1 or 10 for those of the paper')
    few = args.percent is not None and args.percent <= 1
    if args.lr_head is None:
        args.lr_head = 0.5 if few else 0.2
    if args.lr is None:
        args.lr = 1e-4 if few else 2e-4
    if args.decay_milestones is None:
        args.decay_milestones = sorted({max(1, args.epochs * 3 // 5), max(1, args.epochs * 4 // 5)})


def train_one_epoch(args, epoch, loader, model, optimizer, scaler, device, layout, silent):
    """Returns the mean loss."""
    steps, total, seen = len(loader), 0.0, 0
    model.train()
    progress = Progress(epoch, args.epochs, 0, steps, args.batch_size * args.world_size, silent=silent)
    for batch, (images, labels, count) in enumerate(loader.epoch(epoch)):
        # the model's own randomness (dropout, stochastic depth) by step and process, also after a resume
        torch.manual_seed(hash((args.seed, epoch * steps + batch, args.rank)))
        with torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp):
            logits = model(images.to(memory_format=layout))
        loss = F.cross_entropy(logits.float(), labels, reduction='sum')
        # DDP averages over the processes: each gives its part of the mean over the whole batch
        share = loss * (args.world_size / count)
        if scaler is None:
            share.backward()
            optimizer.step()
        else:
            scaler(share, optimizer)
        optimizer.zero_grad()
        total, seen = total + loss.detach(), seen + count
        progress.bar.update()
        if (batch + 1) % args.log_interval == 0 or batch + 1 == steps:
            progress.report(batch + 1, total.item() * args.world_size / seen, optimizer.param_groups[1]['lr'], None)
    progress.bar.close()
    if args.distributed:
        dist.all_reduce(total)
    return total.item() / seen


def main(argv=None):
    args = parser.parse(argv)
    choose_settings(args)
    device = init_run(args)
    primary = utils.is_primary(args)

    # ---- backbone and the labelled images
    backbone, data_config = load_backbone(args)
    train_set, val_set = open_labelled(args, args.train_split), open_labelled(args, args.val_split)
    num_classes = check_classes(train_set, val_set)
    if args.label_list:
        chosen = listed_subset(train_set, args.label_list)
    else:
        with blame('--percent', args.percent):
            chosen = balanced_subset(labels_of(train_set), args.percent / 100, args.seed)
    names = class_names(train_set, num_classes)
    total_images = len(train_set)
    train_set = ImageSubset(train_set, chosen, image_mode(data_config['input_size'][0]))
    loader = CropLoader(
        train_set,
        data_config,
        batch_size=args.batch_size,
        device=device,
        seed=args.seed,
        workers=args.workers,
        rank=args.rank,
        world_size=args.world_size,
        scale=args.scale,
        hflip=args.hflip,
        least=2,  # batch statistics of a single image are none
    )
    settings = dict(
        model=args.digest,
        images=hashlib.sha256(chosen.tobytes()).hexdigest(),
        lr=args.lr,
        lr_head=args.lr_head,
        epochs=args.epochs,
        decay_milestones=args.decay_milestones,
        batch_size=args.batch_size * args.world_size,
        seed=args.seed,
        num_classes=num_classes,
        optimization=(args.momentum, args.weight_decay, args.decay_rate),
        augmentation=(*args.scale, args.hflip),
        input=data_config,
    )
    state = find_state(args.output, args.resume, settings)

    # ---- classifier and optimisation; order matters: device and layout, SyncBN, optimiser, DDP
    with blame('--model', args.model):
        start = LinearHeads(backbone.head_hidden_size, num_classes, [args.lr_head], seed=args.seed)
        classifier = as_classifier(backbone, start.weights[0], start.biases[0], data_config)
    classifier.requires_grad_(True)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    classifier.to(device).to(memory_format=layout)
    if args.distributed and device.type == 'cuda' and not args.no_sync_bn:
        classifier = convert_sync_batchnorm(classifier)
    scaling = args.batch_size * args.world_size / 256
    optimizer = torch.optim.SGD(
        param_groups(classifier, args.lr * scaling, args.lr_head * scaling),
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=True,
    )
    fill_momentum(optimizer)
    scheduler = MultiStepLR(optimizer, args.decay_milestones, gamma=args.decay_rate)
    scaler = utils.NativeScaler(device.type) if args.amp and args.amp_dtype == 'float16' else None
    start_epoch = 0
    if state is not None:
        classifier.load_state_dict(state['classifier'])
        load_optimizer(optimizer, state['optimizer'])
        scheduler.load_state_dict(state['scheduler'])
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr()):
            group['lr'] = rate  # a MultiStepLR goes on from the rate that it finds
        if scaler is not None and state['scaler'] is not None:
            scaler.load_state_dict(state['scaler'])
        start_epoch = state['epoch']
    model = classifier
    if args.distributed:
        model = DistributedDataParallel(classifier, device_ids=[device] if device.type == 'cuda' else None)
    summary = Summary(os.path.join(args.output, 'summary.csv'), start_epoch) if args.output and primary else None
    if primary:
        _logger.info(
            f'{args.model}: {len(chosen)} of {total_images} images labelled, {num_classes} classes, {len(val_set)} to '
            f'judge by, lr {args.lr:g} and {args.lr_head:g} (head), {args.epochs} epochs on {device}')

    # ---- training
    began = saved = time.monotonic()
    judged_last = None
    for epoch in range(start_epoch, args.epochs):
        last = epoch + 1 == args.epochs
        with logging_redirect_tqdm():
            loss = train_one_epoch(
                args, epoch, loader, model, optimizer, scaler, device, layout, silent=not primary)
        scheduler.step()
        if not torch.tensor(loss).isfinite():
            if primary:
                _logger.error(f'The loss is not finite in epoch {epoch}: lower --lr-head, --lr may help')
            end_run(args)
            return 1
        if args.distributed:  # each process has its own batch statistics where they are not synchronised
            utils.distribute_bn(classifier, args.world_size, reduce=True)
        row = {'epoch': epoch, 'train_loss': loss}
        if last or (args.val_interval and (epoch + 1) % args.val_interval == 0):
            judged_last = extract_distributed(Logits(classifier), val_set, data_config, args, device)
            row['eval_top1'], row['eval_top5'] = top_accuracy(*judged_last)
            if primary:
                _logger.info(f"epoch {epoch}: loss {loss:.4f}, top-1 {row['eval_top1']:.2f} %")
        if summary is not None:
            if last or 'eval_top1' in row or time.monotonic() - saved > 60:
                summary.add(row)
                save_state(
                    os.path.join(args.output, 'last.pth.tar'), settings, epoch=epoch + 1,
                    classifier=classifier.state_dict(), optimizer=optimizer.state_dict(),
                    scheduler=scheduler.state_dict(), scaler=None if scaler is None else scaler.state_dict())
                saved = time.monotonic()
            else:
                summary.rows.append(row)

    # ---- what it comes to
    if judged_last is None:  # a finished run, resumed
        judged_last = extract_distributed(Logits(classifier), val_set, data_config, args, device)
    if not primary:
        return end_run(args)
    logits, val_labels = judged_last
    top1, top5 = top_accuracy(logits, val_labels)
    size = min(data_config['input_size'][1:])
    report = dict(
        **what_is_judged(args),
        protocol='semi-supervised',
        top1=round(top1, 4),
        top1_err=round(100 - top1, 4),
        top5=round(top5, 4),
        top5_err=round(100 - top5, 4),
        percent=round(100 * len(chosen) / total_images, 4),
        lr=args.lr,
        lr_head=args.lr_head,
        epochs=args.epochs,
        num_classes=num_classes,
        train_images=len(chosen),
        val_images=len(val_labels),
        img_size=size,
        crop_pct=eval_crop_pct(size),
        interpolation=data_config['interpolation'],
        seconds=round(time.monotonic() - began, 1),
    )
    if args.output:
        predictions = logits.argmax(dim=1)
        save_confusion(val_labels, predictions, os.path.join(args.output, 'confusion.png'), names)
        save_class_accuracy(val_labels, predictions, os.path.join(args.output, 'classes.png'), names)
        export_classifier(classifier, os.path.join(args.output, 'export'), data_config, 'semisup', names)
    write_results(args, report)
    return end_run(args)


def cli(argv=None):
    return parser.run(main, argv)


if __name__ == '__main__':
    sys.exit(cli())
