"""Fine-tuning of a detector: parameter groups, learning rate, batch statistics."""
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.utils import distribute_bn
from torch.optim.swa_utils import update_bn

from timm_cgh.distributed import Process

from .dataset import Target

__all__ = ['param_groups', 'rate_factor', 'recompute_batch_norm', 'split_steps']


def param_groups(model: nn.Module, weight_decay: float) -> List[Dict[str, Any]]:
    """Parameters with weight decay, and those of norm layers without."""
    # by the names of the classes, since timm has dozens of them
    norms = {
        id(p) for m in model.modules() if 'norm' in type(m).__name__.lower() for p in m.parameters(recurse=False)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        dict(params=[p for p in parameters if id(p) not in norms], weight_decay=weight_decay),
        dict(params=[p for p in parameters if id(p) in norms], weight_decay=0.0)]


def rate_factor(
        step: int,
        decay_milestones: Sequence[int],
        decay_rate: float = 0.1,
        warmup_iterations: int = 100,
        warmup_factor: float = 1e-3,
) -> float:
    """Learning rate of a step as a part of the base rate: linear warm-up from a factor, a decay at each milestone."""
    progress = min(1.0, step / warmup_iterations) if warmup_iterations else 1.0
    return (warmup_factor + (1 - warmup_factor) * progress) * decay_rate ** sum(step >= m for m in decay_milestones)


def split_steps(steps: range, *intervals: int) -> Iterator[range]:
    """The steps in parts that end where a multiple of one of the intervals is done; an interval of 0 has none."""
    start = steps.start
    while start < steps.stop:
        stop = min([steps.stop, *((start // interval + 1) * interval for interval in intervals if interval)])
        yield range(start, stop)
        start = stop


@torch.no_grad()
def recompute_batch_norm(
        detector: nn.Module,
        batches: Optional[Iterable[Tuple[List[torch.Tensor], List[Target]]]],
        process: Process = Process(),
        amp_dtype: Optional[torch.dtype] = None,
) -> None:
    """Replace running statistics by their averages over training batches with the current weights (PreciseBN).

    Collective: every rank must call, with as many batches.

    Args:
        detector: its batch norms are updated
        batches: images and targets; None keeps the statistics of training, averaged over the processes
        process: this process
        amp_dtype: of autocast
    """
    if batches is not None:
        # update_bn calls the model with one object that is no tuple
        handle = detector.register_forward_pre_hook(lambda module, inputs: inputs[0]['images and targets'])
        with torch.autocast(process.device.type, amp_dtype, amp_dtype is not None):
            update_bn(({'images and targets': batch} for batch in batches), detector)
        handle.remove()
    if process.distributed:
        distribute_bn(detector, process.world_size, reduce=True)
