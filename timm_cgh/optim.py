"""Safe use of torch's fused optimisers, which access memory without a look at strides or initial values."""
from typing import Any, Dict

import torch

__all__ = ['fill_momentum', 'load_optimizer']


def fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Initialise SGD's missing momentum buffers to 0, which leaves its first step unchanged.

    torch's fused SGD allocates its buffers without initialising them and fills them in its first step, but not where a
    gradient scaler skips that step for infinite gradients: the second step would use uninitialised memory.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group['params']:
            if group['momentum'] and not group['dampening'] and parameter.requires_grad:
                optimizer.state[parameter].setdefault('momentum_buffer', torch.zeros_like(parameter))


def load_optimizer(optimizer: torch.optim.Optimizer, state: Dict[str, Any]) -> None:
    """Load the per-parameter state of an optimiser; learning rates, weight decay, ... stay those of `optimizer`.

    The state takes the memory format of its parameter, which may have changed since it was saved (channels last, say):
    the fused optimisers on a CPU ignore strides.

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
