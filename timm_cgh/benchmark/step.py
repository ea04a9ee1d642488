"""A training step beside the bare backbone, and what the variants cost."""
import argparse
import copy
import statistics
from typing import Any, Callable, Dict, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from timm_cgh.data import multi_crop, two_views
from timm_cgh.models import ContextEncoder, create_backbone
from timm_cgh.progress import peak_memory
from timm_cgh.task import create_task

from .loss import relation_loss
from .timing import autocast, in_turn, median_ratio, memory_of, random_images, timed

__all__ = ['benchmark_step', 'benchmark_variants', 'cgh_step']


def floor_step(args: argparse.Namespace, device: torch.device, images: torch.Tensor) -> Callable[[], None]:
    """Student forward + backward + SGD, teacher forward, with torch's own defaults."""
    student = create_backbone(args.model, img_size=args.img_size).to(device).train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    if args.channels_last:
        student.to(memory_format=torch.channels_last)
        teacher.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step():
        with autocast(args, device):
            with torch.no_grad():
                teacher(images)
            loss = student(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def cgh_step(args: argparse.Namespace, device: torch.device, **variant: Any) -> Callable[[Any], None]:
    """A step of CGH on views, as `train.py` does it; `variant` are options of `create_task`."""
    variant = variant or dict(context=args.context)
    task = create_task(args.model, bank_size=args.bank_size, img_size=args.img_size, **variant)
    task.to(device)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.torchcompile:
        task.compile()
    if dist.is_initialized():
        task.prepare_distributed()
    optimizer = create_optimizer_v2(task.student, 'momentum', lr=0.01, weight_decay=1e-4, fused=True)

    def step(views):
        with autocast(args, device):
            loss = task(views)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()

    return step


def lightly_moco_step(args: argparse.Namespace, device: torch.device, images: torch.Tensor) -> Callable[[], None]:
    """MoCo-v2 as lightly's examples write it: its head, loss and momentum update, around the same backbone."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum
    backbone = create_backbone(args.model, img_size=args.img_size)
    width = backbone.head_hidden_size
    student = torch.nn.Sequential(backbone, MoCoProjectionHead(width, width, 128)).to(device).train()
    teacher = copy.deepcopy(student)
    deactivate_requires_grad(teacher)
    criterion = NTXentLoss(memory_bank_size=(args.bank_size, 128)).to(device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step():
        update_momentum(student, teacher, m=0.99)
        with autocast(args, device):
            query = student(images)
            with torch.no_grad():
                shuffled, shuffle = batch_shuffle(images)
                key = batch_unshuffle(teacher(shuffled), shuffle)
            loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def parts_of_step(args: argparse.Namespace, device: torch.device, images: torch.Tensor) -> Dict[str, Callable]:
    """What a step does beyond its floor, each alone on data of its sizes; and the matrix products that the loss must do."""
    task = create_task(args.model, context='cross', bank_size=args.bank_size, img_size=args.img_size).to(device)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    student, teacher = task.student, task.teacher
    with torch.no_grad():
        pooled, maps = student.forward_contexts(images)

    def embed(encoder: ContextEncoder, pooled: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        hyper = encoder.hyper_projector(encoder.hypercolumn(maps))
        return F.normalize(encoder.projector(pooled), dim=1).sum() + F.normalize(hyper, dim=1).sum()

    def heads():
        with torch.no_grad():
            embed(teacher, pooled, maps)
        embed(student, pooled.clone().requires_grad_(), [m.clone().requires_grad_() for m in maps]).backward()

    parameters = [p for name, p in student.named_parameters() if not name.startswith('backbone.')]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    heads()
    loss, products = relation_loss(argparse.Namespace(device=device, embed_dim=512), args.bank_size, len(images))
    return {
        'relation loss': loss,
        'its products': products,
        'hypercolumn, heads': heads,
        'their SGD': optimizer.step,
        'teacher update': task.update_ema,
    }


def benchmark_step(args: argparse.Namespace) -> Dict[str, Any]:
    """Milliseconds of a CGH step and of its floor, and peak memory.

    The floor is student forward + backward + SGD and teacher forward, nothing else, with torch's own defaults.
    """
    device = torch.device(args.device)
    torch.manual_seed(0)
    images = random_images(args, device)
    cgh = cgh_step(args, device)
    steps = {'floor': floor_step(args, device, images), 'cgh': lambda: cgh([images, images])}
    for step in steps.values():
        timed(step, device, 1)
    peak = peak_memory(device)  # of the process on a CPU: floor and libraries included
    if args.lightly:
        steps['lightly'] = lightly_moco_step(args, device, images)
    if args.parts:
        steps.update(parts_of_step(args, device, images))
    seconds = in_turn(args, device, steps)
    medians = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    result = dict(
        ms=medians,
        ratio=median_ratio(seconds['cgh'], seconds['floor']),
        images_per_s=1000 * args.batch_size / medians['cgh'],
        peak_memory_mib=peak,
        seconds=seconds,
    )
    print(
        f'{args.model} {args.img_size} px, batch {args.batch_size}, bank {args.bank_size}: '
        f"step {medians['cgh']:.1f} ms, floor {medians['floor']:.1f} ms, ratio {result['ratio']:.2f}, "
        f"{result['images_per_s']:.1f} images/s, peak {result['peak_memory_mib']:.0f} MiB")
    if args.parts:
        print('beyond the floor, ms: ' + ', '.join(
            f'{name} {value:.1f}' for name, value in medians.items() if name not in ('floor', 'cgh', 'lightly')))
    if args.lightly:
        result['lightly_ratio'] = median_ratio(seconds['lightly'], seconds['floor'])
        print(f"lightly's MoCo: {medians['lightly']:.1f} ms, {result['lightly_ratio']:.2f} of the floor")
    return result


VARIANTS = {
    'global (ReSSL)': dict(context='global'),
    'moco': dict(context='global', method='moco'),
    'same': dict(context='same'),
    'cross': dict(context='cross'),
    'cross, four stages': dict(context='cross', out_indices=(-4, -3, -2, -1)),
    'cross, predictor': dict(context='cross', predictor=True),
    'cross, predictor, multi-crop': dict(context='cross', predictor=True),
}


def variant_step(args: argparse.Namespace, name: str) -> Callable[[], None]:
    """A call that does one step of a variant."""
    device = torch.device(args.device)
    sizes = [args.img_size] * 2
    if 'multi-crop' in name:
        sizes += [view.size for view in multi_crop(two_views(args.img_size))[2:]]
    views, step = [random_images(args, device, size) for size in sizes], cgh_step(args, device, **VARIANTS[name])
    return lambda: step(views)


def call_variant(args: argparse.Namespace, name: str) -> None:
    """Two steps, for their memory."""
    step = variant_step(args, name)
    step()
    step()


def benchmark_variants(args: argparse.Namespace) -> Dict[str, Any]:
    """Images per second and memory of the variants of CGH, relative to global-context (the paper's training cost)."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    seconds = in_turn(args, device, {name: variant_step(args, name) for name in VARIANTS})
    first = next(iter(VARIANTS))
    memory = {name: memory_of(call_variant, args, name) for name in VARIANTS}
    result = {
        name: dict(
            images_per_s=args.batch_size / statistics.median(values),
            relative_rate=median_ratio(seconds[first], values),
            memory_mib=memory[name],
            relative_memory=memory[name] / memory[first],
        )
        for name, values in seconds.items()
    }
    print(f'{args.model} {args.img_size} px, batch {args.batch_size}, bank {args.bank_size}, {device}')
    print(f'{"":30}  images/s  relative    MiB  relative')
    for name, row in result.items():
        print(f"{name:30}  {row['images_per_s']:8.1f}  {row['relative_rate']:8.2f}  {row['memory_mib']:5.0f}  "
              f"{row['relative_memory']:8.2f}")
    return dict(variants=result, seconds=seconds)
