#!/usr/bin/env python3
"""Pre-train a timm backbone on unlabelled images with CGH (cross-context learning, WACV 2024).

    python train.py                                     # scikit-learn's digits, two minutes on two cores
    python train.py --data-dir images/ --model resnet50 --epochs 200
    torchrun --nproc_per_node 8 train.py --config my.yaml --data-dir imagenet/
"""
import argparse
import contextlib
import logging
import math
import os
import signal
import sys
from typing import Iterable, NamedTuple, Optional, Set

# On a CPU, OpenMP threads that wait for each other spin; beside data workers they would starve one another.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch
import torch.distributed as dist
import yaml
from timm import utils
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.arguments import Parser, at_least_one, fraction, natural, non_negative, positive
from timm_cgh.data import (
    Batch, ViewsToDevice, create_view_loader, image_mode, is_stream, num_images, open_dataset, open_eval_datasets)
from timm_cgh.errors import blame
from timm_cgh.eval.monitor import KnnMonitor
from timm_cgh.eval.relations import RelationTracker, relation_columns, selection_text
from timm_cgh.files import atomic_write
from timm_cgh.loss import CONTEXTS
from timm_cgh.optim import fill_momentum
from timm_cgh.progress import Progress, StopRequest, peak_memory
from timm_cgh.resume import check_same_place, open_run_folder, order_of, restore
from timm_cgh.run import (
    all_unreadable, build_task, check_view_sizes, create_tracker, describe_run, export_run, leave_files,
    warn_if_collapsed)
from timm_cgh.settings import choose_settings, choose_views, resolve_data_config
from timm_cgh.summary import Boards, Summary
from timm_cgh.task import PEERS, Meter, MomentumTask, RunSaver

_logger = logging.getLogger('train')
DEFAULT_CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configs', 'digits.yaml')

parser = Parser(description='CGH pre-training of a timm backbone')
parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of these options; the command line overrides it')

group = parser.add_argument_group('Data')
group.add_argument('--data-dir', metavar='DIR', help='folder of images (class folders or none), tar, root of --dataset')
group.add_argument('--dataset', metavar='NAME', default='',
                   help="digits, or timm's torch/..., hfds/..., hfids/..., wds/..., tfds/...; default: folder or tar")
group.add_argument('--train-split', metavar='NAME', default='train')
group.add_argument('--val-split', metavar='NAME', help='labelled, for kNN; default: found, or a fifth of the images')
group.add_argument('--dataset-download', action='store_true', help='allow the download of torch/ and other data sets')
group.add_argument('--dataset-trust-remote-code', action='store_true')
group.add_argument('--class-map', metavar='FILE', default='')
group.add_argument('--input-key', metavar='NAME')
group.add_argument('--target-key', metavar='NAME')
group.add_argument('--num-samples', metavar='N', type=at_least_one, help='images per epoch of a stream')
group.add_argument('-j', '--workers', metavar='N', type=natural, default=min(4, os.cpu_count() or 1))
group.add_argument('--no-pin-mem', action='store_true', help='do not pin host memory (CUDA only)')

group = parser.add_argument_group('Model')
group.add_argument('--model', metavar='NAME', default='resnet50', help='any timm model')
group.add_argument('--pretrained', action='store_true', help="start from timm's weights")
group.add_argument('--initial-checkpoint', metavar='FILE', help='start from these weights (safetensors or torch file)')
group.add_argument('--features-only', action='store_true', help="timm's features_only wrapper: ends with the last map")
group.add_argument('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs, metavar='KEY=VALUE')
group.add_argument('--img-size', metavar='PX', type=at_least_one, help="training size; default: the model's")
group.add_argument('--in-chans', metavar='N', type=int, default=3, help='3 (colour) or 1 (grey)')
group.add_argument('--mean', nargs='+', type=float, metavar='X', help="of pixels in [0, 1]; default: the model's")
group.add_argument('--std', nargs='+', type=positive, metavar='X')
group.add_argument('--drop-path', type=fraction, metavar='RATE', help='stochastic depth of the student')
group.add_argument('--grad-checkpointing', action='store_true')

group = parser.add_argument_group('Method (defaults: paper Sec. 4.1 and the authors\' code)')
group.add_argument('--method', choices=('cgh', 'moco', *PEERS), default='cgh',
                   help='moco: MoCo-v2, InfoNCE alone; the others for comparison, by the lightly library')
group.add_argument('--method-kwargs', nargs='*', default={}, action=utils.ParseKwargs, metavar='KEY=VALUE',
                   help="of the lightly methods: prototypes, temperature")
group.add_argument('--context', choices=CONTEXTS, default='cross', help='cross: CGH; same; global: ReSSL (Tab. 5)')
group.add_argument('--out-indices', nargs='+', type=int, metavar='I', help='hypercolumn stages; default the last two')
group.add_argument('--hidden-dim', type=at_least_one, default=4096, metavar='N', help='hidden width of the projectors')
group.add_argument('--embed-dim', type=at_least_one, default=512, metavar='N', help='width of the embeddings')
group.add_argument('--predictor', action='store_true', help='predictors on the student (CGH-pred)')
group.add_argument('--hyper-norm', choices=('batch', 'group', 'none'), default='batch', help='norm of the hypercolumn')
group.add_argument('--bank-size', type=at_least_one, metavar='N',
                   help='default: the power of two at or below an eighth of the images, at most 131072')
group.add_argument('--momentum-teacher', type=fraction, default=0.999, metavar='M', help='Eq. 7')
group.add_argument('--temp-student', type=positive, default=0.1, metavar='T', help='tau_s')
group.add_argument('--temp-teacher', type=positive, default=0.04, metavar='T', help='tau_t')
group.add_argument('--temp-hyper', type=positive, default=0.08, metavar='T', help='tau_h, both sides (Tab. 6)')
group.add_argument('--temp-hyper-teacher', type=positive, metavar='T', help="the teacher's tau_h where it differs")
group.add_argument('--relation-weight', type=non_negative, metavar='W', help='of each term; default 0.5, global: 1')
group.add_argument('--contrast-warmup-epochs', type=non_negative, metavar='N',
                   help='InfoNCE hands over to the relation loss; default 5 (at most a quarter of the run), global: 0')
group.add_argument('--contrast-temp', type=positive, default=0.2, metavar='T', help='of InfoNCE')
group.add_argument('--shuffle-bn', action='store_true', help="shuffle the teacher's batch across processes")
group.add_argument('--bn-splits', type=at_least_one, default=1, metavar='N',
                   help="in one process: batch statistics over N parts of the batch, the teacher's in another order")
group.add_argument('--sync-bn', action='store_true', help='batch statistics over all processes (GPU)')

group = parser.add_argument_group('Views')
group.add_argument('--scale', nargs=2, type=positive, default=[0.2, 1.0], metavar=('MIN', 'MAX'), help='crop area')
group.add_argument('--multi-crop', nargs='*', type=at_least_one, metavar='PX',
                   help="sizes of the student's crops, the full one first; without sizes the paper's five (Tab. 2)")
group.add_argument('--multi-crop-scale', nargs='+', type=positive, metavar='MIN MAX',
                   help='crop area of each; default --scale in proportion to the size')
group.add_argument('--ratio', nargs=2, type=positive, default=[3 / 4, 4 / 3], metavar=('MIN', 'MAX'))
group.add_argument('--weak-scale', nargs=2, type=positive, metavar=('MIN', 'MAX'), help='of the teacher')
group.add_argument('--hflip', type=fraction, default=0.5, metavar='P')
group.add_argument('--color-jitter', nargs=4, type=non_negative, default=[0.4, 0.4, 0.4, 0.1],
                   metavar=('B', 'C', 'S', 'H'), help='brightness, contrast, saturation, hue')
group.add_argument('--color-jitter-prob', type=fraction, default=0.8, metavar='P')
group.add_argument('--grayscale-prob', type=fraction, default=0.2, metavar='P')
group.add_argument('--gaussian-blur-prob', type=fraction, default=0.5, metavar='P')
group.add_argument('--gaussian-blur-sigma', nargs=2, type=positive, default=[0.1, 2.0],
                   metavar=('MIN', 'MAX'), help='px')
group.add_argument('--train-interpolation', choices=('bilinear', 'bicubic'), default='bilinear')

group = parser.add_argument_group('Optimisation')
group.add_argument('--epochs', type=at_least_one, default=200, metavar='N', help='warm-up included')
group.add_argument('-b', '--batch-size', type=at_least_one, default=256, metavar='N', help='per process')
group.add_argument('--grad-accum-steps', type=at_least_one, default=1, metavar='N')
group.add_argument('--opt', default='momentum', metavar='NAME', help="timm optimiser; 'sgd' there is Nesterov")
group.add_argument('--opt-eps', type=positive, metavar='X')
group.add_argument('--opt-betas', type=float, nargs='+', metavar='X')
group.add_argument('--opt-kwargs', dest='opt_args', nargs='*', default={}, action=utils.ParseKwargs,
                   metavar='KEY=VALUE')
group.add_argument('--momentum', type=fraction, default=0.9, metavar='M', help="the optimiser's")
group.add_argument('--weight-decay', type=non_negative, default=1e-4, metavar='X')
group.add_argument('--no-decay-norm-bias', action='store_true', help='no weight decay on norms and biases')
group.add_argument('--lr', type=non_negative, metavar='X', help='overrides --lr-base')
group.add_argument('--lr-base', type=non_negative, default=0.05, metavar='X',
                   help='lr = lr-base x global batch / lr-base-size')
group.add_argument('--lr-base-size', type=at_least_one, default=256, metavar='N')
group.add_argument('--lr-base-scale', choices=('linear', 'sqrt'), default='linear')
group.add_argument('--sched', default='cosine',
                   choices=('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'constant', 'none'))
group.add_argument('--warmup-epochs', type=non_negative, metavar='N', help='default 5, at most a quarter of the run')
group.add_argument('--warmup-lr', type=non_negative, default=0.0, metavar='X')
group.add_argument('--min-lr', type=non_negative, default=0.0, metavar='X')
group.add_argument('--decay-epochs', type=positive, metavar='N',
                   help='between steps (default 90); of the decay of wsd (default the last fifth)')
group.add_argument('--decay-milestones', type=at_least_one, nargs='+', default=[90, 180, 270], metavar='N',
                   help='epochs, counted from the beginning of the run')
group.add_argument('--decay-rate', type=positive, default=0.1, metavar='X')
group.add_argument('--clip-grad', type=positive, metavar='NORM')
group.add_argument('--clip-mode', choices=('norm', 'value', 'agc'), default='norm')

group = parser.add_argument_group('Run')
group.add_argument('--output', default=os.path.join('output', 'train'), metavar='DIR')
group.add_argument('--experiment', default='', metavar='NAME', help='folder of the run; default: time, model and size')
group.add_argument('--resume', metavar='FILE|auto', help="auto: --experiment's newest, or afresh; or hf-hub:OWNER/NAME")
group.add_argument('--checkpoint-hist', type=at_least_one, default=1, metavar='N', help='kept beside last and best')
group.add_argument('--recovery-interval', type=natural, default=0, metavar='N',
                   help='batches between recovery checkpoints, 0 for none')
group.add_argument('--knn-interval', type=natural, default=5, metavar='N', help='epochs between kNN checks, 0 for none')
group.add_argument('--knn-images', type=at_least_one, default=10000, metavar='N', help='at most, on either side of kNN')
group.add_argument('--track-relations', type=selection_text, nargs='?', const='10/K', metavar='THRESHOLD',
                   help="recall and precision of the teacher's positives (Fig. 2), for one batch per --log-interval: "
                        'where its probability is at least 10/K (default), or the top20; wants labelled images')
group.add_argument('--log-interval', type=at_least_one, default=50, metavar='N', help='batches')
group.add_argument('--log-wandb', action='store_true')
group.add_argument('--log-tensorboard', action='store_true')
group.add_argument('--seed', type=natural, default=42, metavar='N')
group.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
group.add_argument('--amp', action='store_true', help='mixed precision')
group.add_argument('--amp-dtype', choices=('float16', 'bfloat16'), default='float16')
group.add_argument('--channels-last', action='store_true')
group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND')


class Parts(NamedTuple):
    """What every epoch needs."""
    task: MomentumTask
    loader: Iterable[Batch]
    to_device: ViewsToDevice
    optimizer: torch.optim.Optimizer
    scheduler: Optional[Scheduler]
    scaler: Optional[utils.NativeScaler]
    saver: RunSaver
    stop: StopRequest
    unreadable: Set[str]
    tracker: Optional[RelationTracker]


def train_one_epoch(args, parts, epoch, start, meter, knn):
    """Train from batch `start` on.

    Returns:
        images per second, or None after a request to stop: the state is saved then

    Raises:
        FloatingPointError: the loss is not finite
    """
    task, loader, to_device, optimizer, scheduler, scaler, saver, stop, unreadable, tracker = parts
    steps, accum = len(loader), args.grad_accum_steps
    task.train()
    loader.set_epoch(epoch, start)
    progress = Progress(
        epoch, args.epochs, start, steps, args.batch_size * args.world_size, silent=not utils.is_primary(args))

    def means():
        values = meter.read()
        if not math.isfinite(values['loss']):
            raise FloatingPointError
        return values

    def save_recovery(done):
        means()  # never over a good checkpoint with a broken state
        if utils.is_primary(args):
            saver.progress.update(epoch=epoch, batch=done, knn=knn, meter=meter.state_dict())
            saver.save_recovery(epoch, done)

    for i, (batch, views) in enumerate(to_device.prefetch(loader), start=start):
        for name in batch.unreadable:
            if name not in unreadable:
                unreadable.add(name)
                _logger.warning(f'Unreadable image passed over: {name} ({len(unreadable)} so far)')
        # The model's own randomness (dropout, stochastic depth) by step and process: a resumed run draws what the
        # uninterrupted one would have.
        torch.manual_seed(hash((args.seed, epoch * steps + i, args.rank)))
        group_start = i // accum * accum
        group_size = min(accum, steps - group_start)
        update = i + 1 == group_start + group_size
        with contextlib.nullcontext() if update else task.no_sync():
            with torch.autocast(to_device.device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp):
                measured = (i + 1) % args.log_interval == 0 or i + 1 == steps
                result = task(views, batch.target, observe=tracker if measured else None)
            loss = result['loss'] / group_size
            if scaler is not None:
                parameters = list(task.student.parameters())
                scaler(loss, optimizer, args.clip_grad, args.clip_mode, parameters, need_update=update)
            else:
                loss.backward()
        if update:
            if scaler is None:
                if args.clip_grad is not None:
                    utils.dispatch_clip_grad(list(task.student.parameters()), args.clip_grad, mode=args.clip_mode)
                optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=task.num_updates + 1)
            if scheduler is not None:
                scheduler.step_update(task.num_updates)
        meter.update(result)

        done = i + 1
        progress.bar.update()
        if done % args.log_interval == 0 or done == steps:
            progress.report(done, means()['loss'], optimizer.param_groups[0]['lr'], knn)
        if update and done < steps:
            if stop.due(args.log_interval) and stop.agreed(to_device.device):
                save_recovery(done)
                progress.bar.close()
                return None
            if args.recovery_interval and done % args.recovery_interval < group_size:
                save_recovery(done)
    progress.bar.close()
    return progress.images_per_second(steps)


def main(argv=None):
    args = parser.parse(
        argv,
        default_config=DEFAULT_CONFIG,
        wants_default=lambda a: not a.config and not a.data_dir and not a.dataset,
    )
    utils.setup_default_logging()
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)
    given = dict(vars(args))
    with blame('--device', args.device):
        device = utils.init_distributed_device(args)
    primary = utils.is_primary(args)
    _logger.setLevel(logging.INFO if primary else logging.WARNING)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = args.amp  # relation loss: within 1e-3, its sums in float32
    if args.config == DEFAULT_CONFIG:
        _logger.info(
            "No --data-dir and no --dataset: training on scikit-learn's 1,797 handwritten digits (configs/digits.yaml)")
    utils.random_seed(args.seed)  # the same start on all processes

    # ---- data set, task, views
    source = dict(
        in_chans=args.in_chans,
        class_map=args.class_map,
        input_key=args.input_key,
        target_key=args.target_key,
        download=args.dataset_download,
        trust_remote_code=args.dataset_trust_remote_code,
    )
    dataset = open_dataset(
        args.dataset,
        args.data_dir,
        args.train_split,
        is_training=True,
        batch_size=args.batch_size,
        seed=args.seed,
        num_samples=args.num_samples,
        **source,
    )
    images = num_images(dataset)
    choose_settings(args, images)
    task, model_kwargs = build_task(args)
    tracker = create_tracker(args, task, dataset)
    data_config = resolve_data_config(args, task.student.backbone.pretrained_cfg)
    img_size = data_config['input_size'][-1]
    views = choose_views(args, img_size)
    check_view_sizes(task, views, args.in_chans)
    folder, resume = open_run_folder(args, img_size)
    loader = create_view_loader(
        dataset,
        views,
        batch_size=args.batch_size,
        seed=args.seed,
        mode=image_mode(args.in_chans),
        workers=args.workers,
        rank=args.rank,
        world_size=args.world_size,
        pin_memory=device.type == 'cuda' and not args.no_pin_mem,
    )
    to_device = ViewsToDevice(data_config['mean'], data_config['std'], device)
    monitor, knn_why = None, 'switched off (--knn-interval 0)'
    if args.knn_interval:
        sets, knn_why = open_eval_datasets(
            args.dataset,
            args.data_dir,
            args.train_split,
            args.val_split,
            max_images=args.knn_images,
            seed=args.seed,
            batch_size=args.batch_size,
            train=None if is_stream(dataset) else dataset,
            **source,
        )
        if sets is not None:
            monitor = KnnMonitor(*sets, data_config, args, device)

    # ---- optimisation; order matters: device and layout, compile, DDP
    updates = math.ceil(len(loader) / args.grad_accum_steps)
    if args.contrast_warmup_epochs:
        task.contrast_warmup = round(args.contrast_warmup_epochs * updates)
    task.to(device)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.sync_bn:
        task.convert_sync_batchnorm()
    with blame('--opt', args.opt):
        options = optimizer_kwargs(cfg=args)
        if args.opt in ('momentum', 'sgd', 'adam', 'adamw') and not options.get('foreach'):
            options.setdefault('fused', True)  # torch's own: one pass over the parameters, on any device
        optimizer = create_optimizer_v2(task.student, filter_bias_and_bn=args.no_decay_norm_bias, **options)
        fill_momentum(optimizer)
    schedule = scheduler_kwargs(args)
    schedule.update(
        num_epochs=args.epochs - args.warmup_epochs,  # the stated epochs hold the warm-up, which timm would add
        warmup_prefix=True,
        decay_milestones=[max(0, epoch - args.warmup_epochs) for epoch in args.decay_milestones],
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    with blame('--sched', args.sched):
        scheduler, _ = create_scheduler_v2(optimizer, **schedule)
    scaler = utils.NativeScaler(device.type) if args.amp and args.amp_dtype == 'float16' else None

    if args.torchcompile:
        with blame('--torchcompile', args.torchcompile):
            task.compile(backend=args.torchcompile)

    # ---- where to start
    start_epoch, start_batch, meter, knn, knn_before = 0, 0, Meter(), None, None
    saver = RunSaver(
        task,
        optimizer=optimizer,
        args=argparse.Namespace(**given),
        amp_scaler=scaler,
        checkpoint_dir=folder,
        recovery_dir=folder,
        max_history=args.checkpoint_hist,
    )
    if resume:
        state = restore(resume, args, task, optimizer, scaler)
        place = state['progress']
        start_epoch, start_batch, knn, knn_before = (place[k] for k in ('epoch', 'batch', 'knn', 'knn_before'))
        if start_batch and place['order'] != order_of(args, len(loader)):
            _logger.warning(f'{resume} was saved with another order of the images: epoch {start_epoch} starts over')
            start_batch = 0
        # schedules go by the place in the run, whatever number of updates an epoch had before
        task.num_updates = start_epoch * updates + start_batch // args.grad_accum_steps
        if start_batch:
            meter.load_state_dict(place['meter'], device)
        if primary and os.path.dirname(os.path.abspath(resume)) == os.path.abspath(folder):
            saver.restore(state, resume)
        _logger.info(f'Resumed {resume} at epoch {start_epoch}, batch {start_batch}')
    check_same_place(resume, start_epoch, start_batch, device)
    if args.distributed:
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None)
    if scheduler is not None:
        scheduler.step_update(task.num_updates)
    summary = Summary(os.path.join(folder, 'summary.csv'), start_epoch)
    boards = Boards()
    if primary:
        with atomic_write(os.path.join(folder, 'args.yaml')) as file:
            yaml.safe_dump(given, file, default_flow_style=None, sort_keys=False)
        boards.open(folder, given, wandb=args.log_wandb, tensorboard=args.log_tensorboard)

    _logger.info(f'{describe_run(args, task, images, img_size, len(loader))} -> {folder}')
    if is_stream(dataset):
        _logger.info('A stream: the order of the images depends on the number of workers, and is not kept by --resume')
    _logger.info(f'kNN: {knn_why}')

    pixels = None
    if monitor is not None:
        pixels = monitor.pixels()
        if start_epoch == start_batch == 0:
            knn = knn_before = monitor(task.student.backbone)
        if primary:
            untrained = '' if knn_before is None else f', of the backbone before training {knn_before:.2f} %'
            _logger.info(f'kNN top-1 of the raw pixels {pixels:.2f} %{untrained}')
    saver.progress = dict(epoch=0, batch=0, knn=knn, knn_before=knn_before, order=order_of(args, len(loader)),
                          bank_size=args.bank_size)

    def export():
        export_run(args, folder, task, summary.rows, data_config, model_kwargs)

    # ---- training
    stop, unreadable, finished = StopRequest(), set(), True
    parts = Parts(task, loader, to_device, optimizer, scheduler, scaler, saver, stop, unreadable, tracker)
    with logging_redirect_tqdm():
        for epoch in range(start_epoch, args.epochs):
            if epoch > start_epoch and stop.agreed(device):
                finished = False
                break
            try:
                rate = train_one_epoch(args, parts, epoch, start_batch, meter, knn)
            except FloatingPointError:
                _logger.error(
                    f'The loss is not finite in epoch {epoch}: stopped. The last good state is in {folder}; a lower '
                    f'--lr, --clip-grad 1 or --amp-dtype bfloat16 may help.')
                return 1
            if rate is None:
                finished = False
                break
            last = epoch + 1 == args.epochs
            due = monitor is not None and ((epoch + 1) % args.knn_interval == 0 or last)
            knn_now = monitor(task.student.backbone) if due else None
            knn = knn if knn_now is None else knn_now
            means = relation_columns(meter.read())
            meter, start_batch = Meter(), 0
            if not primary:
                continue
            row = {'epoch': epoch, **{f'train_{k}': v for k, v in means.items()}, 'train_images_per_s': round(rate, 1)}
            if math.isfinite(memory := peak_memory(device)):
                row['train_peak_memory_mib'] = round(memory)
            if knn_now is not None:
                row['eval_knn'] = round(knn_now, 3)
            row['lr'] = optimizer.param_groups[0]['lr']
            if epoch + 1 > max(args.warmup_epochs, args.contrast_warmup_epochs):
                warn_if_collapsed(row, args.bank_size)
            summary.add(row)  # before the checkpoint: a resumed run finds the rows of all epochs that it skips
            saver.progress.update(epoch=epoch + 1, batch=0, knn=knn, meter=None)
            saver.save_checkpoint(epoch, metric=knn_now)
            if not last:  # before it goes on: whoever takes the backbone of a running or a killed run takes the newest
                export()
            averages = ', '.join(f'{k[6:]} {v:.4g}' for k, v in row.items() if k.startswith('train_'))
            _logger.info(f"epoch {epoch}: {averages}{'' if knn_now is None else f', kNN {knn_now:.2f} %'}")
            boards.add(row)

    # ---- what the run leaves
    unreadable = all_unreadable(unreadable)
    if primary:
        levels = {k: v for k, v in (('untrained', knn_before), ('raw pixels', pixels)) if v is not None}
        export()
        files = leave_files(args, folder, task, summary.rows, levels, tracker)
        if not finished:
            name = signal.Signals(stop.signum).name
            _logger.info(f'Stopped by {name}; state saved, --resume auto continues {folder}')
        elif knn_before is not None and pixels is not None:
            _logger.info(f'kNN top-1: {knn_before:.2f} % before, {knn:.2f} % after training; raw pixels {pixels:.2f} %')
        if unreadable:
            _logger.warning(f'{len(unreadable)} unreadable images were passed over')
        _logger.info(f"Files in {folder}: {', '.join(files)}")
        exported = os.path.join(folder, 'export')
        _logger.info(f"Load the backbone: timm.create_model('local-dir:{exported}', pretrained=True)")
    if args.distributed:
        dist.destroy_process_group()
    return 0 if finished else 128 + stop.signum


def cli(argv=None):
    return parser.run(main, argv)


if __name__ == '__main__':
    sys.exit(cli())
