#!/usr/bin/env python3
"""Pre-train a timm backbone on unlabelled images with CGH (cross-context learning, WACV 2024).

    python train.py                                     # UCI's handwritten digits, a few minutes on a CPU
    python train.py --data-dir images/ --model resnet50 --epochs 200
    torchrun --nproc_per_node 8 train.py --config my.yaml --data-dir imagenet/
"""
import contextlib
import logging
import math
import os
import sys

# On a CPU, OpenMP threads that wait for each other spin; beside data workers they would starve one another.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import numpy as np
import torch
from timm import utils
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs
from torch.utils.data import Subset
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.arguments import (
    KeyValues, Parser, add_config_argument, add_dataset_arguments, add_decoding_arguments, add_device_arguments,
    add_input_arguments, arguments_of, at_least_one, autocast_dtype, fraction, natural, non_negative, positive)
from timm_cgh.data import ViewsToDevice, create_view_loader, is_stream, num_images, open_dataset, open_knn_datasets
from timm_cgh.data.labels import fingerprint
from timm_cgh.data.sources import create_decoding
from timm_cgh.distributed import end_process, init_process
from timm_cgh.errors import InputError, checking, redact
from timm_cgh.eval.features import FeatureExtractor, extract_features
from timm_cgh.loss import CONTEXTS
from timm_cgh.models.backbone import as_image_size, resolve_data_config
from timm_cgh.progress import log_to_console, log_to_file
from timm_cgh.task import BASELINES
from timm_cgh.task.positives import Selection
from timm_cgh.train.boards import check_packages
from timm_cgh.train.build import (
    build_backbone, build_optimizer, build_scheduler, build_task, build_tracker, check_views)
from timm_cgh.train.monitor import KnnMonitor, QualityMonitor
from timm_cgh.train.resume import claim_folder, find_run
from timm_cgh.train.run import Run
from timm_cgh.train.settings import HYPER_NORMS, choose_views, settle, task_options
from timm_cgh.train.stop import StopRequest

_logger = logging.getLogger('train')
DEFAULT_CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configs', 'digits.yaml')

parser = Parser(__doc__)
parser.default_config = DEFAULT_CONFIG
add_config_argument(parser)

group = parser.add_argument_group('Data')
group.add_argument('--data-dir', metavar='DIR',
                   help='folder of images (class folders or none), tar, root of --dataset; default: '
                        "UCI's handwritten digits")
group.add_argument('--dataset', metavar='NAME', default='',
                   help="digits, or timm's torch/..., hfds/..., hfids/..., wds/..., tfds/...; default: folder or tar")
group.add_argument('--knn-dir', metavar='DIR',
                   help='labelled images for the kNN evaluation: class folders, in folders train and val or not; '
                        'default: labelled training images')
group.add_argument('--train-split', metavar='NAME', default='train',
                   help='split, or subfolder of --data-dir, to train on')
group.add_argument('--val-split', metavar='NAME',
                   help='labelled split for kNN; default: found, or a fifth of the images')
add_dataset_arguments(group)
group.add_argument('--num-samples', metavar='N', type=at_least_one,
                   help="images per epoch of a stream; default: the stream's own number")
add_decoding_arguments(group)
group.add_argument('-j', '--workers', metavar='N', type=natural, default=min(4, os.cpu_count() or 1),
                   help='processes that read images, for each process of the job')
group.add_argument('--no-pin-mem', action='store_true', help='do not pin host memory (CUDA only)')

group = parser.add_argument_group('Model')
group.add_argument('--model', metavar='NAME', default='resnet50', help='any timm model')
group.add_argument('--pretrained', action='store_true', help="start from timm's weights")
group.add_argument('--initial-checkpoint', metavar='FILE',
                   help='file, run, export or hf-hub:OWNER/NAME of weights to start from; default: none')
group.add_argument('--features-only', action='store_true', help="timm's features_only wrapper: ends with the last map")
add_input_arguments(group, in_chans=3)
group.add_argument('--drop-path', type=fraction, metavar='RATE',
                   help="rate of the student's stochastic depth; default: the model's")
group.add_argument('--grad-checkpointing', action='store_true',
                   help='compute activations again in the backward pass: less memory, more time')

group = parser.add_argument_group("Method (defaults: paper Sec. 4.1 and the authors' code)")
group.add_argument('--method', choices=('cgh', 'moco', *BASELINES), default='cgh',
                   help='moco: MoCo-v2, InfoNCE alone; the others for comparison, by the lightly library')
group.add_argument('--method-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
                   help='arguments of the lightly methods (prototypes, temperature); default: none')
group.add_argument('--context', choices=CONTEXTS, default='cross',
                   help='cross: CGH; same: each context teaches itself; global: ReSSL (Tab. 5)')
group.add_argument('--out-indices', nargs='+', type=int, metavar='I',
                   help='stages of the hypercolumn; default: the last two, of plain ViTs four evenly spaced blocks')
group.add_argument('--hidden-dim', type=at_least_one, default=4096, metavar='N', help='hidden width of the projectors')
group.add_argument('--embed-dim', type=at_least_one, default=512, metavar='N', help='width of the embeddings')
group.add_argument('--predictor', action='store_true', help='predictors on the student (CGH-pred)')
group.add_argument('--hyper-norm', choices=HYPER_NORMS, default='batch', help='norm of the hypercolumn')
group.add_argument('--bank-size', type=at_least_one, metavar='N',
                   help='embeddings in each memory bank; default: the power of two at or below an eighth of the '
                        'images, at most 131072')
group.add_argument('--momentum-teacher', type=fraction, default=0.999, metavar='M',
                   help='momentum m of the teacher (Eq. 7)')
group.add_argument('--temp-student', type=positive, default=0.1, metavar='T',
                   help="tau_s, temperature of the student's relations")
group.add_argument('--temp-teacher', type=positive, default=0.04, metavar='T',
                   help="tau_t, temperature of the teacher's relations")
group.add_argument('--temp-hyper', type=positive, default=0.08, metavar='T',
                   help='tau_h, temperature of hypercolumn relations on both sides (Tab. 6)')
group.add_argument('--temp-hyper-teacher', type=positive, metavar='T',
                   help="the teacher's tau_h; default: --temp-hyper")
group.add_argument('--relation-weight', type=non_negative, metavar='W',
                   help='weight of each term of the loss; default: 0.5, with --context global 1')
group.add_argument('--contrast-warmup-epochs', type=non_negative, metavar='N',
                   help='epochs in which InfoNCE hands over to the relation loss; default: 5, at most a quarter of '
                        'the run, with --context global 0')
group.add_argument('--contrast-temp', type=positive, default=0.2, metavar='T',
                   help='temperature of InfoNCE in the warm-up')
group.add_argument('--shuffle-bn', action='store_true', help="shuffle the teacher's batch across processes")
group.add_argument('--bn-splits', type=at_least_one, default=1, metavar='N',
                   help="in one process: batch statistics over N parts of the batch, the teacher's in another order")
group.add_argument('--sync-bn', action='store_true', help='batch statistics over all processes (GPU)')

group = parser.add_argument_group('Views')
group.add_argument('--scale', nargs=2, type=positive, default=[0.2, 1.0], metavar=('MIN', 'MAX'),
                   help="range of a crop's share of the image area")
group.add_argument('--multi-crop', nargs='*', type=at_least_one, metavar='PX',
                   help="sizes of the student's crops, the full one first; without sizes the paper's five (Tab. 2); "
                        "default: one crop")
group.add_argument('--multi-crop-scale', nargs='+', type=positive, metavar='MIN MAX',
                   help='range of the share of the area of each crop; default: --scale in proportion to the size')
group.add_argument('--ratio', nargs=2, type=positive, default=[3 / 4, 4 / 3], metavar=('MIN', 'MAX'),
                   help="range of a crop's aspect ratio")
group.add_argument('--weak-scale', nargs=2, type=positive, metavar=('MIN', 'MAX'),
                   help="range of the teacher's crop; default: --scale")
group.add_argument('--hflip', type=fraction, default=0.5, metavar='P', help='probability of a horizontal flip')
group.add_argument('--color-jitter', nargs=4, type=non_negative, default=[0.4, 0.4, 0.4, 0.1], metavar=('B', 'C', 'S',
                   'H'),
                   help='strengths of the jitter of brightness, contrast, saturation and hue')
group.add_argument('--color-jitter-prob', type=fraction, default=0.8, metavar='P',
                   help='probability of the colour jitter')
group.add_argument('--grayscale-prob', type=fraction, default=0.2, metavar='P', help='probability of a grey view')
group.add_argument('--gaussian-blur-prob', type=fraction, default=0.5, metavar='P',
                   help='probability of a blurred view')
group.add_argument('--gaussian-blur-sigma', nargs=2, type=positive, default=[0.1, 2.0], metavar=('MIN', 'MAX'),
                   help='range of the standard deviation of the blur, px')
group.add_argument('--train-interpolation', choices=('bilinear', 'bicubic'), default='bilinear',
                   help='interpolation where crops are resized')

group = parser.add_argument_group('Optimisation')
group.add_argument('--epochs', type=at_least_one, default=200, metavar='N', help='epochs to train, warm-up included')
group.add_argument('-b', '--batch-size', type=at_least_one, default=256, metavar='N',
                   help='images in a batch of one process')
group.add_argument('--grad-accum-steps', type=at_least_one, default=1, metavar='N',
                   help='batches whose gradients make one step')
group.add_argument('--opt', default='momentum', metavar='NAME', help="optimiser of timm, where 'sgd' is Nesterov's")
group.add_argument('--opt-eps', type=positive, metavar='X', help="epsilon of the optimiser; default: the optimiser's")
group.add_argument('--opt-betas', type=float, nargs='+', metavar='X',
                   help="betas of the optimiser; default: the optimiser's")
group.add_argument('--opt-kwargs', dest='opt_args', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
                   help='further arguments of the optimiser; default: none')
group.add_argument('--momentum', type=fraction, default=0.9, metavar='M', help='momentum of the optimiser')
group.add_argument('--weight-decay', type=non_negative, default=1e-4, metavar='X', help='weight decay of the optimiser')
group.add_argument('--no-decay-norm-bias', action='store_true', help='no weight decay on norms and biases')
group.add_argument('--lr', type=non_negative, metavar='X', help='learning rate; default: from --lr-base')
group.add_argument('--lr-base', type=non_negative, default=0.05, metavar='X',
                   help='learning rate for --lr-base-size images a step, scaled to the global batch')
group.add_argument('--lr-base-size', type=at_least_one, default=256, metavar='N',
                   help='images a step that --lr-base is meant for')
group.add_argument('--lr-base-scale', choices=('linear', 'sqrt'), default='linear',
                   help='how the learning rate grows with the global batch')
group.add_argument('--sched', default='cosine', choices=('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd',
                   'constant', 'none'),
                   help='schedule of the learning rate')
group.add_argument('--warmup-epochs', type=non_negative, metavar='N',
                   help='epochs in which the learning rate rises; default: 5, at most a quarter of the run')
group.add_argument('--warmup-lr', type=non_negative, default=0.0, metavar='X',
                   help='learning rate that the warm-up starts from')
group.add_argument('--min-lr', type=non_negative, default=0.0, metavar='X',
                   help='learning rate that the schedule ends with')
group.add_argument('--decay-epochs', type=positive, metavar='N',
                   help='epochs between steps (default: 90); of the decay of wsd (default: the last fifth)')
group.add_argument('--decay-milestones', type=at_least_one, nargs='+', default=[90, 180, 270], metavar='N',
                   help='epochs of the steps of multistep, counted from the beginning of the run')
group.add_argument('--decay-rate', type=positive, metavar='X',
                   help='factor of the learning rate at each step (default: 0.1); power of poly (default: 1)')
group.add_argument('--clip-grad', type=positive, metavar='NORM',
                   help='limit of the gradients, see --clip-mode; default: none')
group.add_argument('--clip-mode', choices=('norm', 'value', 'agc'), default='norm',
                   help='what --clip-grad limits: the norm, each value, or the norm relative to the weight')

group = parser.add_argument_group('Run')
group.add_argument('--output', default=os.path.join('output', 'train'), metavar='DIR',
                   help='folder for the folders of runs')
group.add_argument('--experiment', default='', metavar='NAME',
                   help='name of the folder of the run; default: time, model and size')
group.add_argument('--resume', metavar='FILE|auto',
                   help="checkpoint to continue from; auto: --experiment's newest, or afresh; or hf-hub:OWNER/NAME; "
                        "default: none")
group.add_argument('--checkpoint-hist', type=at_least_one, default=1, metavar='N',
                   help='best checkpoints kept beside the last one')
group.add_argument('--checkpoint-interval', type=natural, default=0, metavar='N',
                   help='epochs between checkpoints that are kept for good (milestone-N.pth.tar), 0 for none')
group.add_argument('--recovery-interval', type=natural, default=0, metavar='N',
                   help='batches between recovery checkpoints, 0 for none')
group.add_argument('--knn-interval', type=natural, default=5, metavar='N',
                   help='epochs between evaluations (kNN, quality), 0 for none')
group.add_argument('--quality-images', type=natural, default=1024, metavar='N',
                   help='training images for RankMe, alignment and uniformity, which need no labels; 0 for none')
group.add_argument('--knn-img-size', type=at_least_one, metavar='PX',
                   help='side of the images in the kNN evaluation; default: the training size')
group.add_argument('--knn-images', type=at_least_one, default=10000, metavar='N',
                   help='images, at most, on either side of the kNN evaluation')
group.add_argument('--track-relations', type=Selection.normalize, nargs='?', const='10/K', metavar='THRESHOLD',
                   help="recall and precision of the teacher's positives (Fig. 2), for one batch per --log-interval: "
                        'where its probability is at least 10/K (default), or the top20; wants labelled images')
group.add_argument('--log-interval', type=at_least_one, default=50, metavar='N',
                   help='batches between two reports of the loss')
group.add_argument('--log-wandb', action='store_true', help='report to Weights & Biases')
group.add_argument('--wandb-project', metavar='NAME', default='timm-cgh', help='project of --log-wandb')
group.add_argument('--log-tensorboard', action='store_true', help='write a log for TensorBoard')
add_device_arguments(group)
group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
                   help='compile the step with torch.compile, by BACKEND or inductor; default: off')


def train_one_epoch(args, run, epoch):
    """Train from where the run stands to the end of the epoch, or until the run must stop."""
    task, optimizer, scaler = run.task, run.optimizer, run.scaler
    device_type, amp_dtype = run.process.device.type, autocast_dtype(args)
    parameters = list(task.student.parameters())
    task.train()
    for step in run.steps(epoch):
        with contextlib.nullcontext() if step.update else task.no_sync():
            with torch.autocast(device_type, dtype=amp_dtype, enabled=args.amp):
                result = task(step.views, step.target, observe=run.tracker if step.logged else None)
            loss = result['loss'] / step.group_size
            if scaler is not None:
                scaler(loss, optimizer, args.clip_grad, args.clip_mode, parameters, need_update=step.update)
            else:
                loss.backward()
        if step.update:
            if scaler is None:
                if args.clip_grad is not None:
                    utils.dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
                optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=task.num_updates + 1)
            if run.scheduler is not None:
                run.scheduler.step_update(task.num_updates)
        if not run.record(step, result):
            break


def start_process(args):
    """Device, process group, seeds."""
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)
    process = init_process(args.device, args.seed)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = args.amp  # relation loss: within 1e-3, its sums in float32
    if args.config == DEFAULT_CONFIG:
        _logger.info("No --data-dir and no --dataset: training on UCI's 1,797 handwritten digits (configs/digits.yaml)")
    return process


def build_loader(args, dataset, views, process):
    """Loader of the training views."""
    loader = create_view_loader(
        dataset,
        views,
        batch_size=args.batch_size,
        seed=args.seed,
        workers=args.workers,
        rank=process.rank,
        world_size=process.world_size,
        pin_memory=process.device.type == 'cuda' and not args.no_pin_mem,
    )
    if is_stream(dataset):
        _logger.info('A stream: the order of the images depends on --workers and is not restored by --resume')
    else:
        loader.read([0])  # images that cannot be read are refused before anything is written
    return loader


def open_knn_images(args, dataset):
    """Labelled images to search and to classify, None where there are none; and their description."""
    if not args.knn_dir:
        source = {**arguments_of(open_knn_datasets, args), **arguments_of(open_dataset, args)}
        train = None if is_stream(dataset) else dataset
        return open_knn_datasets(**source, max_images=args.knn_images, train=train)
    decoding = arguments_of(create_decoding, args)
    try:
        sets, description = open_knn_datasets(
            '', args.knn_dir, None, None, max_images=args.knn_images, seed=args.seed, **decoding)
    except InputError as error:
        raise InputError(str(error).replace('data_dir', 'knn_dir')) from error
    if sets is None:
        raise InputError(f'knn_dir={args.knn_dir}: {description}')
    return sets, f'{len(sets[1])} images of {args.knn_dir} against {len(sets[0])} others there'


def build_monitor(args, dataset, model, data_config, process):
    """kNN evaluation along training, None where it is switched off or no images are labelled."""
    if not args.knn_interval:
        _logger.info('kNN: switched off (--knn-interval 0)')
        return None
    sets, description = open_knn_images(args, dataset)
    _logger.info(f'kNN: {description}')
    if sets is None:
        return None
    size = data_config['input_size']
    if args.knn_img_size is not None:
        size = args.in_chans, args.knn_img_size, args.knn_img_size
        with checking('knn_img_size', args.knn_img_size, AssertionError, RuntimeError, ValueError):
            extract_features(model, [(torch.zeros(2, *size), torch.zeros(2))])
    return KnnMonitor(*sets, FeatureExtractor(
        {**data_config, 'input_size': size},
        process,
        batch_size=args.batch_size,
        workers=args.workers,
        amp_dtype=autocast_dtype(args),
        channels_last=args.channels_last,
    ))


def build_quality(args, dataset, views, to_device):
    """Evaluation without labels on fixed views of some training images; None for streams and very few images."""
    count = min(args.quality_images, num_images(dataset))
    if not args.knn_interval or is_stream(dataset) or count < 16:
        return None
    some = np.sort(np.random.default_rng(args.seed).permutation(num_images(dataset))[:count])
    loader = create_view_loader(Subset(dataset, some.tolist()), views[:2], min(args.batch_size, count), args.seed)
    return QualityMonitor(loader, to_device, autocast_dtype(args), args.channels_last)


def prepare_optimization(args, task, steps, process):
    """Move the task to its device; optimiser, schedule and gradient scaler. The order of these steps matters."""
    updates_per_epoch = math.ceil(steps / args.grad_accum_steps)
    if args.contrast_warmup_epochs:
        task.contrast_warmup = round(args.contrast_warmup_epochs * updates_per_epoch)
    task.to(process.device)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.sync_bn:
        task.convert_sync_batchnorm()
    optimizer = build_optimizer(task.student, args.no_decay_norm_bias, **optimizer_kwargs(cfg=args))
    scheduler = build_scheduler(optimizer, scheduler_kwargs(args), args.epochs, updates_per_epoch)
    scaler = utils.NativeScaler(process.device.type) if args.amp and args.amp_dtype == 'float16' else None
    if args.torchcompile:
        with checking('torchcompile', args.torchcompile, RuntimeError):
            task.compile(backend=args.torchcompile)
    return optimizer, scheduler, scaler


def pretrain(args):
    """The whole job; returns the `Run`."""
    given = redact(vars(args))
    with contextlib.ExitStack() as stack:
        open_log = stack.enter_context(log_to_file())
        stop = stack.enter_context(StopRequest())
        process = start_process(args)
        check_packages(args.log_wandb, args.log_tensorboard)
        dataset = open_dataset(**arguments_of(open_dataset, args), split=args.train_split, is_training=True)
        backbone = build_backbone(**arguments_of(build_backbone, args))
        data_config = resolve_data_config(
            backbone.module.pretrained_cfg, interpolation=args.train_interpolation,
            **arguments_of(resolve_data_config, args))
        img_size = as_image_size(data_config['input_size'][1:])
        size = 'x'.join(map(str, dict.fromkeys(data_config['input_size'][1:])))
        name = f"{args.model.replace('/', '_').replace(':', '_')}-{size}"
        folder, point = find_run(args.output, args.experiment, args.resume, name)
        settle(args, num_images(dataset), process.world_size, point and point.progress.get('bank_size'))

        task = build_task(backbone.module, method_kwargs=args.method_kwargs, **task_options(args))
        views = choose_views(args, img_size)
        check_views(task, views, args.in_chans)
        tracker = build_tracker(args.track_relations, task, dataset)
        loader = build_loader(args, dataset, views, process)
        to_device = ViewsToDevice(data_config['mean'], data_config['std'], process.device)
        monitor = build_monitor(args, dataset, backbone.module, data_config, process)
        optimizer, scheduler, scaler = prepare_optimization(args, task, len(loader), process)

        folder = stack.enter_context(claim_folder(folder, args.output, bool(args.experiment), point is None, process))
        if process.primary:
            open_log(os.path.join(folder, 'train.log'))
        run = Run(
            given=given,
            settings=args,
            folder=folder,
            process=process,
            stop=stop,
            backbone=backbone,
            task=task,
            loader=loader,
            to_device=to_device,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=scaler,
            data_config=data_config,
            images=num_images(dataset),
            fingerprint=fingerprint(dataset),
            monitor=monitor,
            quality=build_quality(args, dataset, views, to_device),
            tracker=tracker,
        )
        run.resume(point)
        del point  # its tensors would stay mapped to the end
        if process.distributed:
            task.prepare_distributed(device_ids=[process.device] if process.device.type == 'cuda' else None)
        millions = sum(p.numel() for p in task.student.backbone.parameters()) / 1e6
        method = f'{args.context} context' if args.method == 'cgh' else args.method
        _logger.info(
            f'{args.model} ({millions:.2f} M parameters), {method}, {num_images(dataset)} images of {size} px, '
            f'{len(loader)} batches of {args.batch_size} x {process.world_size} an epoch, lr {args.lr:g}, bank '
            f'{args.bank_size}, on {args.device} -> {folder}')
        run.begin()
        with logging_redirect_tqdm():
            for epoch in run.epochs_left():
                train_one_epoch(args, run, epoch)
                run.end_epoch()
        run.finish()
    end_process(process)
    return run


def main(argv=None):
    with log_to_console():
        return pretrain(parser.parse(argv)).exit_code


if __name__ == '__main__':
    sys.exit(parser.run(main))
