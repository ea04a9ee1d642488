#!/usr/bin/env python3
"""Transfer to object detection and instance segmentation (Sec. 4.4, Tab. 4): fine-tune a detector on a backbone.

    python eval_detection.py -c configs/eval_digits_fpn.yaml --model resnet10t --no-pretrained    # minutes on a CPU
    torchrun --nproc_per_node 8 eval_detection.py -c configs/eval_voc_c4.yaml -b 2 --model cgh_resnet50 --data-dir data/
    python eval_detection.py --eval-only output/detection/detector.safetensors --dataset voc --data-dir data/
"""
import json
import logging
import os
import sys
import time
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional

# On a CPU, OpenMP threads that wait for each other spin; beside data workers they would starve one another.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import NativeScaler
from torch.nn.parallel import DistributedDataParallel
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.arguments import (
    Parser, add_model_arguments, arguments_of, at_least_one, autocast_dtype, fraction, natural, non_negative, positive)
from timm_cgh.distributed import end_process
from timm_cgh.errors import InputError
from timm_cgh.eval import detection
from timm_cgh.eval.backbone import Backbone, load_backbone
from timm_cgh.eval.checkpoint import Recorder, find_state
from timm_cgh.eval.results import describe_model, write_results
from timm_cgh.eval.start import start_evaluation
from timm_cgh.models.checkpoints import weights_digest
from timm_cgh.models.export import export_backbone
from timm_cgh.progress import Progress

_logger = logging.getLogger('eval')
SPLITS = dict(  # by data set: those of the paper, where it has it
    voc=('2007_trainval+2012_trainval', '2007_test'), coco=('train2017', 'val2017'), masks=('train', 'validation'),
    digits=('train', 'validation'))
PREFIXES = dict(bbox='', segm='mask_')  # of the names of results

parser = Parser(__doc__)
add_model_arguments(parser)
parser.set_defaults(batch_size=16)
group = parser.add_argument_group('Annotated images')
group.add_argument('--dataset', choices=tuple(SPLITS), default='digits',
                   help='VOCdevkit; COCO or any json of its form; a folder of images/ and masks/; scenes of digits')
group.add_argument('--data-dir', metavar='DIR', help='folder of the data set; default: none, for digits')
group.add_argument('--dataset-download', action='store_true', help='let torchvision fetch VOC')
group.add_argument('--train-split', metavar='NAME',
                   help='VOC: YEAR_SET, joined by +; COCO: NAME of annotations/instances_NAME.json, or a json file; '
                        "default: the paper's")
group.add_argument('--val-split', metavar='NAME', help="the same for the test images; default: the paper's")
group.add_argument('--val-images', metavar='N', type=at_least_one,
                   help='images of --dataset masks that are held out; default: 3 of 10')
group = parser.add_argument_group("Detector (defaults: MoCo-v2's protocol, as in Sec. 4.4)")
group.add_argument('--head', choices=('c4', 'fpn'), default='c4',
                   help='detection head: c4 for ResNets, fpn for every backbone')
group.add_argument('--masks', action='store_true', help='instance segmentation as well (Mask R-CNN)')
group.add_argument('--anchor-sizes', type=positive, nargs='+', metavar='PX',
                   help='c4: at each location, default 32 to 512; fpn: one per map, default 8 times its stride')
group.add_argument('--channels', type=at_least_one, default=256, metavar='N',
                   help='channels of the pyramid and the mask head')
group.add_argument('--rois', type=at_least_one, default=512, metavar='N', help='per training image')
group.add_argument('--train-proposals', type=at_least_one, nargs=2, metavar=('PRE', 'POST'),
                   help='before and after NMS; default 12000 2000 (c4), 2000 1000 (fpn)')
group.add_argument('--test-proposals', type=at_least_one, nargs=2, metavar=('PRE', 'POST'),
                   help='the same in a test; default: 6000 1000 (c4), 1000 1000 (fpn)')
group = parser.add_argument_group('Fine-tuning')
group.add_argument('--iterations', type=at_least_one, default=24000, metavar='N', help='steps to train')
group.add_argument('--lr', type=positive, default=0.02, metavar='X',
                   help='learning rate for 16 images a step (scaled linearly)')
group.add_argument('--decay-milestones', type=at_least_one, nargs='+', metavar='N',
                   help='iterations; default at 18 and 22 24ths of the run')
group.add_argument('--decay-rate', type=positive, default=0.1, metavar='X',
                   help='factor of the learning rate at each milestone')
group.add_argument('--warmup-iterations', type=natural, default=100, metavar='N',
                   help='steps in which the learning rate rises')
group.add_argument('--warmup-factor', type=positive, default=0.001, metavar='X',
                   help='share of the learning rate that the warm-up starts from')
group.add_argument('--momentum', type=fraction, default=0.9, metavar='M', help='momentum of SGD')
group.add_argument('--weight-decay', type=non_negative, default=1e-4, metavar='X',
                   help='weight decay of all but norm layers')
group.add_argument('--min-size', type=at_least_one, nargs='+', default=list(range(480, 801, 32)), metavar='PX',
                   help='short sides of training images, one is drawn for each')
group.add_argument('--test-size', type=at_least_one, default=800, metavar='PX', help='short side of test images')
group.add_argument('--max-size', type=at_least_one, default=1333, metavar='PX', help='limit of the long side of images')
group.add_argument('--hflip', type=fraction, default=0.5, metavar='P', help='probability of a horizontal flip')
group.add_argument('--bn', choices=('sync', 'local'), help='batch statistics: default sync on GPUs')
group.add_argument('--bn-iterations', type=natural, default=200, metavar='N',
                   help='batches from which batch statistics are computed before a test')
group.add_argument('--log-interval', type=at_least_one, default=50, metavar='N',
                   help='iterations between two reports of the loss')
group.add_argument('--resume', metavar='FILE',
                   help="checkpoint to continue from; 'auto': that in --output, where there is one; default: none")
group = parser.add_argument_group('Evaluation')
group.add_argument('--metric', choices=('coco', 'voc07'),
                   help='metric of the results; default: voc07 for VOC (Tab. 4), else coco')
group.add_argument('--val-interval', type=natural, default=0, metavar='N',
                   help='iterations between tests; 0: at the end only')
group.add_argument('--eval-only', metavar='FILE',
                   help='evaluate this detector.safetensors without training; default: train')
group.add_argument('--baseline', metavar='FILE',
                   help="detections.json of another run: AP50's gain over it, with a bootstrap interval; default: none")
group.add_argument('--pictures', type=natural, default=8, metavar='N', help='images in the picture of --output')


class Data(NamedTuple):
    """Splits of the data set: annotations of the validation images, items to train on and to draw."""
    annotations: detection.Annotations
    val: detection.DetectionImages
    train: Any  # DetectionImages; None for --eval-only
    classes: List[str]
    categories: List[Any]  # id of each class in the validation annotations
    dropped: Dict[str, Dict[str, int]]  # objects, by split and reason
    baseline: Optional[List[dict]]  # detections of another run on the validation images


def choose_settings(args):
    """Check the options, and fill in those that depend on others."""
    args.train_split = args.train_split or SPLITS[args.dataset][0]
    args.val_split = args.val_split or SPLITS[args.dataset][1]
    args.metric = args.metric or ('voc07' if args.dataset == 'voc' else 'coco')
    if args.metric == 'voc07' and args.dataset != 'voc':
        raise InputError('metric=voc07: is defined by VOC annotations; `dataset` voc')
    if args.metric == 'coco' or args.baseline:
        detection.mask_api()  # refuse now, rather than after the training, where pycocotools is missing
    if args.decay_milestones is None:
        args.decay_milestones = [max(1, args.iterations * part // 24) for part in (18, 22)]
    if (last := max(args.decay_milestones)) > args.iterations:
        raise InputError(f'decay_milestones: {last} is past the end, `iterations` {args.iterations}')
    for name, size in (('min_size', max(args.min_size)), ('test_size', args.test_size)):
        if size > args.max_size:
            raise InputError(f'{name}={size}: must not exceed `max_size` {args.max_size}')
    on_gpu = args.device.startswith('cuda')
    if args.bn == 'sync' and not on_gpu:
        raise InputError('bn=sync: GPUs only, on a CPU take local')
    args.bn = args.bn or ('sync' if on_gpu else 'local')
    args.amp_dtype = autocast_dtype(args)


def open_data(args, in_chans, masks, classes=None):
    """Annotations and images; `classes` of a trained detector stand for those of training images."""
    options = arguments_of(detection.open_annotations, args)
    train, dropped, trained = None, {}, set()
    if classes is None:
        annotations = detection.open_annotations(split=args.train_split, split_parameter='train_split', **options)
        objects, dropped['train'] = detection.training_objects(annotations, masks)
        train = detection.DetectionImages(annotations, objects, in_chans, masks)
        classes, trained = annotations.classes, annotations.files
    annotations = detection.open_annotations(split=args.val_split, split_parameter='val_split', **options)
    if shared := trained & annotations.files:
        raise InputError(
            f'val_split={args.val_split}: {len(shared)} of its images are trained on, such as {min(shared)}')
    categories = detection.category_numbers(classes, annotations)
    objects, dropped['validation'] = detection.training_objects(annotations, masks, 'val_split')
    val = detection.DetectionImages(annotations, objects, in_chans, masks)
    baseline = detection.read_detections(args.baseline, annotations, masks) if args.baseline else None
    return Data(annotations, val, train, classes, categories, dropped, baseline)


def load_any_size(args):
    """The backbone, built for images of any size if its architecture has an option for that (ViTs)."""
    options = arguments_of(load_backbone, args)
    try:
        return load_backbone(**{**options, 'model_kwargs': {'dynamic_img_size': True, **args.model_kwargs}})
    except InputError as error:
        if 'dynamic_img_size' not in str(error):
            raise
        return load_backbone(**options)


def create_detector(args, backbone, data, process):
    """The detector on the device."""
    torch.manual_seed(args.seed)
    detector = detection.create_detector(
        backbone.model, backbone.data_config, data.classes, **arguments_of(detection.create_detector, args))
    total = sum(p.numel() for p in backbone.model.parameters())
    if detector.unused:
        share = 100 * sum(detector.unused.values()) / total
        _logger.info(
            f'{share:.1f} % of the parameters of {backbone.name} lie behind its last map and stay as they are: '
            f"{', '.join(list(detector.unused)[:4])}{', ...' * (len(detector.unused) > 4)}")
    detector.to(process.device)
    if args.channels_last:
        detector.to(memory_format=torch.channels_last)
    return convert_sync_batchnorm(detector) if args.bn == 'sync' else detector


def resume_settings(args, backbone, data, detector, process):
    """What a run must have in common with the checkpoint that it resumes."""
    return dict(
        model=backbone.digest,
        train_images=len(data.train),
        objects=sum(map(len, data.train.objects)),
        detector=json.dumps(detector.config),
        iterations=args.iterations,
        batch_size=args.batch_size * process.world_size,
        seed=args.seed,
        optimization=(
            args.lr, args.decay_milestones, args.decay_rate, args.warmup_iterations, args.warmup_factor, args.momentum,
            args.weight_decay, args.bn, str(args.amp_dtype)),
        augmentation=(args.min_size, args.max_size, args.hflip),
    )


def train(args, steps, batches, model, optimizer, scaler, process):
    """Returns the mean losses of some steps, by name."""
    totals: Dict[str, Any] = {}
    model.train()
    for step, (images, targets) in zip(steps, batches):
        for group in optimizer.param_groups:
            group['lr'] = args.scaled_lr * detection.rate_factor(step, **arguments_of(detection.rate_factor, args))
        # anchors and RoIs are drawn by step and process, also after a resume
        torch.manual_seed(hash((args.seed, step, process.rank)))
        with torch.autocast(process.device.type, args.amp_dtype, args.amp):
            losses = model(images, targets)
        loss = sum(losses.values())
        if not loss.isfinite():
            raise InputError(f'lr={args.lr:g}: the loss is not finite in iteration {step}; lower it')
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler(loss, optimizer)
        optimizer.zero_grad()
        for name, value in dict(losses, loss=loss).items():
            totals[name] = totals.get(name, 0) + value.detach()
    return {name: value.item() / len(steps) for name, value in totals.items()}


def evaluate(args, detector, data, process):
    """Detections on the validation images, and their average precisions (None on other ranks than the first)."""
    detections = detection.find_objects(
        detector, data.annotations, data.categories, process, workers=args.workers, amp_dtype=args.amp_dtype)
    if not process.primary:
        return detections, None
    masks = detector.config['masks']
    return detections, detection.evaluate_detections(data.annotations, detections, args.metric, masks)


def fine_tune(args, detector, data, settings, state, process):
    """Train and evaluate the detector; returns what the last evaluation did, None for a finished run."""
    batches = partial(
        detection.training_batches, data.train,
        detection.training_transform(args.min_size, args.max_size, args.hflip), batch_size=args.batch_size,
        seed=args.seed, workers=args.workers, process=process)
    optimizer = torch.optim.SGD(
        detection.param_groups(detector, args.weight_decay), lr=args.scaled_lr, momentum=args.momentum)
    scaler = NativeScaler(process.device.type) if args.amp_dtype is torch.float16 else None
    parts = dict(detector=detector, optimizer=optimizer, **({} if scaler is None else dict(scaler=scaler)))
    start = 0
    if state is not None:
        start = state['iteration']
        for name, part in parts.items():
            part.load_state_dict(state[name])
    model = detector
    if process.distributed:
        model = DistributedDataParallel(detector, [process.device] if process.device.type == 'cuda' else None)
    recorder = Recorder(args.output if process.primary else None, settings, start, 'iteration')
    progress = Progress(
        0, 1, start, args.iterations, args.batch_size * process.world_size, silent=not process.primary)
    stream, found = progress.waiting(batches(range(start, args.iterations))), None
    for steps in detection.split_steps(range(start, args.iterations), args.log_interval, args.val_interval):
        losses = train(args, steps, stream, model, optimizer, scaler, process)
        lr = optimizer.param_groups[0]['lr']
        progress.bar.update(len(steps))
        progress.report(steps.stop, losses['loss'], lr)
        row = dict(iteration=steps[-1], lr=lr, **{f'train_{name}': value for name, value in losses.items()})
        last = steps.stop == args.iterations
        if last or (args.val_interval and steps.stop % args.val_interval == 0):
            again = range(steps.stop, steps.stop + args.bn_iterations)
            detection.recompute_batch_norm(detector, batches(again) if again else None, process, args.amp_dtype)
            found = evaluate(args, detector, data, process)
            if process.primary:
                row.update({f'eval_{name}': value for name, value in named_values(found[1]).items()})
                _logger.info(f"{steps.stop} iterations: AP {row['eval_AP']:.2f}, AP50 {row['eval_AP50']:.2f}")
        recorder.add(row, last or 'eval_AP' in row, **{name: part.state_dict() for name, part in parts.items()})
    progress.bar.close()
    return found


def named_values(precisions):
    """AP, AP50, AP75 of the boxes, and mask_AP, ... of the masks."""
    return {
        PREFIXES[kind] + name: value
        for kind, precision in precisions.items() for name, value in precision.summary().items()}


def gains(data, detections, kinds):
    """The gain in AP50 over the baseline's detections, with a bootstrap interval."""
    results = {}
    for kind in kinds if data.baseline is not None else ():
        values = detection.bootstrap_ap50(data.annotations.content, detections, data.baseline, kind)
        results[f'{PREFIXES[kind]}AP50_gain'] = {
            name: round(value, 2) for name, value in zip(('gain', 'low', 'high'), values)}
    return results


def write_files(args, backbone, data, detector, detections, precisions):
    """Write the detections, their picture, the detector and its backbone."""
    detection.write_detections(args.output, detections, precisions)
    if args.pictures:
        chosen = torch.randperm(len(data.val), generator=torch.Generator().manual_seed(args.seed))[:args.pictures]
        detection.save_detections_picture(
            os.path.join(args.output, 'detections.png'), data.annotations, data.val, chosen.tolist(), detections,
            data.categories, data.classes)
    if not args.eval_only:
        detection.save_detector(detector, os.path.join(args.output, 'detector.safetensors'))
        export_backbone(
            detector.backbone.body, os.path.join(args.output, 'export'), tag='detection', **backbone.data_config)


def report(args, backbone, data, detector, detections, precisions, seconds):
    """Print and write the results."""
    training = {} if args.eval_only else dict(
        train_split=args.train_split, train_images=len(data.train), iterations=args.iterations, lr=args.scaled_lr)
    write_results(dict(
        **describe_model(backbone, args.dataset, args.data_dir, args.val_split),
        protocol=f"detection, {detector.config['head']}",
        metric=args.metric,
        **named_values(precisions),
        **gains(data, detections, precisions),
        **training,
        val_images=len(data.val),
        num_classes=len(data.classes),
        test_size=detector.config['test_size'],
        dropped=data.dropped,
        unused_parameters=sum(detector.unused.values()),
        seconds=round(seconds, 1),
    ), args.results_file)


def load_trained(args):
    """The detector of --eval-only, and its backbone."""
    detector = detection.load_detector(args.eval_only)
    body = detector.backbone.body
    return detector, Backbone(
        body, body.pretrained_cfg['architecture'], detector.config['data_config'], weights_digest(detector),
        os.path.basename(args.eval_only))


def main(argv=None):
    args = parser.parse(argv)
    choose_settings(args)
    process = start_evaluation(**arguments_of(start_evaluation, args))
    args.scaled_lr = args.lr * args.batch_size * process.world_size / 16
    began, found = time.monotonic(), None

    if args.eval_only:
        detector, backbone = load_trained(args)
        config = detector.config
        data = open_data(args, config['data_config']['input_size'][0], config['masks'], config['classes'])
        detector.to(process.device)
    else:
        backbone = load_any_size(args)
        data = open_data(args, backbone.data_config['input_size'][0], args.masks)
        detector = create_detector(args, backbone, data, process)
        settings = resume_settings(args, backbone, data, detector, process)
        state = find_state(args.output, args.resume, settings)
        _logger.info(
            f'{backbone.name}, {args.head}: {len(data.train)} training images, {len(data.classes)} classes, '
            f'{len(data.val)} validation images, {args.iterations} iterations, lr {args.scaled_lr:g}, {process.device}')
        with logging_redirect_tqdm():
            found = fine_tune(args, detector, data, settings, state, process)

    detections, precisions = found or evaluate(args, detector, data, process)
    end_process(process)
    if process.primary:
        if args.output:
            write_files(args, backbone, data, detector, detections, precisions)
        report(args, backbone, data, detector, detections, precisions, time.monotonic() - began)
    return 0


if __name__ == '__main__':
    sys.exit(parser.run(main))
