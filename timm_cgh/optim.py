"""torch's fused optimisers, which walk through memory as it lies, and what they need to be safe."""
from typing import Any, Dict

import torch

__all__ = ['fill_momentum', 'load_optimizer']


def fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Have SGD start from momentum 0 where it has none yet, which makes its first step the gradient, as it is without.

    torch's fused SGD takes unwritten memory for its buffers and fills them in its first step: not when a gradient scaler
    has found that step's gradients infinite. The second step would then use them as they are.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group['params']:
            if group['momentum'] and not group['dampening'] and parameter.requires_grad:
                optimizer.state[parameter].setdefault('momentum_buffer', torch.zeros_like(parameter))


def load_optimizer(optimizer: torch.optim.Optimizer, state: Dict[str, Any]) -> None:
    """`optimizer.load_state_dict` of the averages alone: rates, weight decay, ... stay those of `optimizer`.

    Parameters may lie in memory in another order than when the state was saved. A state keeps its order (channels first,
    say), and the fused optimisers on a CPU have no look at strides.

    Raises:
        ValueError, KeyError: the state of other parameters, or of another optimiser
    """
    foreign = {k for group in state['param_groups'] for k in group} - {'params', 'initial_lr', 'lr_scale', 'step'}
    foreign -= {k for group in optimizer.param_groups for k in group}
    if foreign:
        raise ValueError(f"the state of another optimiser, one with {', '.join(sorted(foreign))}")
    settings = [{k: v for k, v in group.items() if k in optimizer.defaults} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, settings):
        group.update(values)
    fill_momentum(optimizer)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
