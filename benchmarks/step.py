"""A training step relative to the backbone's alone, its parts, and what the variants cost."""
import argparse
import copy
import statistics
from functools import partial
from typing import Any, Callable, Dict, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from timm_cgh.data import multi_crop, two_views
from timm_cgh.layers import MemoryBank
from timm_cgh.loss import CrossContextLoss
from timm_cgh.models import ContextEncoder, Contexts, create_backbone
from timm_cgh.progress import peak_memory
from timm_cgh.task import CGHTask, create_task

from .timing import autocast, in_turn, median_ratio, memory_format, memory_of, random_images, timed

__all__ = ['CGHStep', 'benchmark_step', 'benchmark_variants', 'relation_loss']

_SGD = dict(lr=0.01, momentum=0.9, weight_decay=1e-4)


def _update(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _compile(args: argparse.Namespace, *modules: torch.nn.Module) -> None:
    for module in modules if args.torchcompile else ():
        module.compile()


def _create_task(args: argparse.Namespace, **variant: Any) -> CGHTask:
    task = create_task(args.model, bank_size=args.bank_size, img_size=args.img_size, **variant)
    return task.to(args.device, memory_format=memory_format(args))


class FloorStep:
    """Student forward + backward + SGD, teacher forward, with torch's own defaults."""

    def __init__(self, args: argparse.Namespace, images: torch.Tensor):
        self.args, self.images = args, images
        self.student = create_backbone(args.model, img_size=args.img_size).train()
        self.student.to(args.device, memory_format=memory_format(args))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        _compile(args, self.student, self.teacher)
        self.optimizer = torch.optim.SGD(self.student.parameters(), **_SGD)

    def __call__(self) -> None:
        with autocast(self.args):
            with torch.no_grad():
                self.teacher(self.images)
            loss = self.student(self.images).float().square().mean()
        _update(loss, self.optimizer)


class CGHStep:
    """A step of CGH on views, as in `train.py`; `variant` are options of `create_task`."""

    def __init__(self, args: argparse.Namespace, **variant: Any):
        self.args = args
        self.task = _create_task(args, **variant or dict(context=args.context))
        _compile(args, self.task)
        if dist.is_initialized():
            self.task.prepare_distributed()
        self.optimizer = create_optimizer_v2(self.task.student, 'momentum', lr=0.01, weight_decay=1e-4, fused=True)

    def __call__(self, views: Sequence[torch.Tensor]) -> None:
        with autocast(self.args):
            loss = self.task(views)['loss']
        _update(loss, self.optimizer)
        self.task.update_ema()


class LightlyMoCoStep:
    """MoCo-v2 as in lightly's examples: its head, loss and momentum update, with the same backbone."""

    def __init__(self, args: argparse.Namespace, images: torch.Tensor):
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad
        self.args, self.images = args, images
        backbone = create_backbone(args.model, img_size=args.img_size)
        width = backbone.head_hidden_size
        self.student = torch.nn.Sequential(backbone, MoCoProjectionHead(width, width, 128)).to(args.device).train()
        self.teacher = copy.deepcopy(self.student)
        deactivate_requires_grad(self.teacher)
        _compile(args, self.student, self.teacher)
        self.criterion = NTXentLoss(memory_bank_size=(args.bank_size, 128)).to(args.device)
        self.optimizer = torch.optim.SGD(self.student.parameters(), **_SGD)

    def __call__(self) -> None:
        from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum
        update_momentum(self.student, self.teacher, m=0.99)
        with autocast(self.args):
            query = self.student(self.images)
            with torch.no_grad():
                shuffled, shuffle = batch_shuffle(self.images)
                key = batch_unshuffle(self.teacher(shuffled), shuffle)
            loss = self.criterion(query, key)
        _update(loss, self.optimizer)


def _embed(encoder: ContextEncoder, pooled: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
    hyper = encoder.hyper_projector(encoder.hypercolumn(maps))
    return F.normalize(encoder.projector(pooled), dim=1).sum() + F.normalize(hyper, dim=1).sum()


def _run_heads(task: CGHTask, pooled: torch.Tensor, maps: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        _embed(task.teacher, pooled, maps)
    _embed(task.student, pooled.clone().requires_grad_(), [m.clone().requires_grad_() for m in maps]).backward()


def _loss(embeddings: torch.Tensor, teacher: Contexts, banks: Dict[str, MemoryBank]) -> None:
    """Both terms of Eq. 6 with their gradients."""
    student = Contexts(*(embeddings.clone().requires_grad_() for _ in range(2)))
    CrossContextLoss()(student, teacher, banks)['loss'].backward()


def _products(embeddings: torch.Tensor, banks: Dict[str, MemoryBank], logits: torch.Tensor) -> None:
    """The six matrix products that the loss needs, by tiles of the size of `logits`, which is overwritten."""
    rows, columns = logits.shape
    for bank in banks.values():
        for part in embeddings.split(rows):
            gradient = torch.zeros_like(part)
            for tile in bank.embeddings.split(columns):
                out = logits[:len(part), :len(tile)]
                torch.mm(part, tile.T, out=out)
                torch.mm(part, tile.T, out=out)
                gradient.addmm_(out, tile)


def relation_loss(device: str, embed_dim: int, bank_size: int, batch_size: int) -> Tuple[Callable, Callable]:
    """Calls that compute the loss of Eq. 6 with its gradients, and the matrix products it needs."""
    banks = {name: MemoryBank(bank_size, embed_dim).to(device) for name in ('global', 'hyper')}
    *teacher, embeddings = F.normalize(torch.randn(3, batch_size, embed_dim, device=device), dim=2)
    rows, columns = batch_size, bank_size
    if torch.device(device).type == 'cpu':  # by tiles whose result stays in the cache
        rows, columns = min(rows, 256), min(columns, 2048)
    logits = torch.zeros(rows, columns, device=device)
    return partial(_loss, embeddings, Contexts(*teacher), banks), partial(_products, embeddings, banks, logits)


def parts_of_step(args: argparse.Namespace, images: torch.Tensor) -> Dict[str, Callable]:
    """What a step does beyond its floor, each part alone on data of its sizes, and the loss's matrix products."""
    task = _create_task(args, context='cross')
    with torch.no_grad():
        pooled, maps = task.student.forward_contexts(images)
    parameters = [p for name, p in task.student.named_parameters() if not name.startswith('backbone.')]
    optimizer = torch.optim.SGD(parameters, fused=True, **_SGD)
    heads = partial(_run_heads, task, pooled, maps)
    heads()  # gives the optimizer gradients
    loss, products = relation_loss(args.device, 512, args.bank_size, len(images))
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
    torch.manual_seed(0)
    images, device = random_images(args), torch.device(args.device)
    step = CGHStep(args)
    cgh = partial(step, [images, images])
    timed(cgh, device, 2)
    peak = peak_memory(device)  # before there is a floor; on a CPU that of the process, which includes the libraries
    steps = {'floor': FloorStep(args, images), 'cgh': cgh}
    if args.lightly:
        steps['lightly'] = LightlyMoCoStep(args, images)
    if args.parts:
        steps.update(parts_of_step(args, images))
    seconds = in_turn(args, steps)
    ms = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    ratio, rate = median_ratio(seconds['cgh'], seconds['floor']), 1000 * args.batch_size / ms['cgh']
    result = dict(ms=ms, ratio=ratio, images_per_s=rate, peak_memory_mib=peak, seconds=seconds)
    print(
        f"{args.model} {args.img_size} px, batch {args.batch_size}, bank {args.bank_size}: step {ms['cgh']:.1f} ms, "
        f"floor {ms['floor']:.1f} ms, ratio {ratio:.2f}, {rate:.1f} images/s, peak {peak:.0f} MiB")
    if args.parts:
        print('beyond the floor, ms: ' + ', '.join(
            f'{name} {value:.1f}' for name, value in ms.items() if name not in ('floor', 'cgh', 'lightly')))
    if args.lightly:
        result['lightly_ratio'] = median_ratio(seconds['lightly'], seconds['floor'])
        print(f"lightly's MoCo: {ms['lightly']:.1f} ms, {result['lightly_ratio']:.2f} of the floor")
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
    """A call that runs one step of a variant."""
    views = two_views(args.img_size)
    if 'multi-crop' in name:
        views = multi_crop(views)
    return partial(CGHStep(args, **VARIANTS[name]), [random_images(args, view.size) for view in views])


def benchmark_variants(args: argparse.Namespace) -> Dict[str, Any]:
    """Images per second and memory of the variants of CGH, relative to global-context (the paper's training cost)."""
    torch.manual_seed(0)
    seconds = in_turn(args, {name: variant_step(args, name) for name in VARIANTS})
    first = next(iter(VARIANTS))
    memory = {name: memory_of(variant_step, args, name) for name in VARIANTS}
    print(f'{args.model} {args.img_size} px, batch {args.batch_size}, bank {args.bank_size}, {args.device}')
    print(f'{"":30}  images/s  relative    MiB  relative')
    result = {}
    for name, values in seconds.items():
        result[name] = row = dict(
            images_per_s=args.batch_size / statistics.median(values),
            relative_rate=median_ratio(seconds[first], values),
            memory_mib=memory[name],
            relative_memory=memory[name] / memory[first],
        )
        print('{:30}  {:8.1f}  {:8.2f}  {:5.0f}  {:8.2f}'.format(name, *row.values()))
    return dict(variants=result, seconds=seconds)
