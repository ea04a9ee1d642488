"""Safe use of torch's fused optimisers, which check neither shapes nor strides nor whether memory was initialised."""
from typing import Any, Dict, Set, Tuple

import torch

__all__ = ['fill_momentum', 'load_optimizer']

_COUNTERS = {'step', 'lookahead_step'}  # in parameter groups, but state and not settings
_ADAM = {'step', 'exp_avg', 'exp_avg_sq'}
# optimisers with fused kernels -> the least and the most state of a parameter that has been updated
_FUSED_STATE: Dict[type, Tuple[Set[str], Set[str]]] = {
    torch.optim.SGD: (set(), {'momentum_buffer'}),
    torch.optim.Adam: (_ADAM, {*_ADAM, 'max_exp_avg_sq'}),
    torch.optim.AdamW: (_ADAM, {*_ADAM, 'max_exp_avg_sq'}),
}


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


def _check_fused(optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` for state that torch's fused kernels would read out of bounds: they check nothing."""
    for parameter, state in optimizer.state.items():
        least, most = _FUSED_STATE.get(type(optimizer), (set(), {*state}))
        if state and not least <= state.keys() <= most:
            raise ValueError(f"per-parameter state {', '.join(sorted(state))}")
        for name, value in state.items():
            shape = torch.Size() if name == 'step' else parameter.shape
            if not isinstance(value, torch.Tensor) or value.shape != shape:
                found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f'{name} is {found} for a parameter of {tuple(parameter.shape)}')


def load_optimizer(optimizer: torch.optim.Optimizer, state: Dict[str, Any]) -> None:
    """Load the state of an optimiser; its settings (learning rates, weight decay, ...) stay those of `optimizer`.

    The state takes the memory format of its parameter, which may have changed since it was saved (channels last, say):
    the fused optimisers on a CPU ignore strides.

    Raises:
        ValueError, KeyError: the state of other parameters, or of another optimiser
    """
    if not all(isinstance(values, dict) for values in state['state'].values()):
        raise ValueError('broken, its state is no dictionary of each parameter')
    foreign = {k for group in state['param_groups'] for k in group} - {'params', 'initial_lr', 'lr_scale', *_COUNTERS}
    foreign -= {k for group in optimizer.param_groups for k in group}
    if foreign:
        raise ValueError(f"the state of another optimiser, one with {', '.join(sorted(foreign))}")
    kept = optimizer.defaults.keys() - _COUNTERS
    settings = [{k: v for k, v in group.items() if k in kept} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, settings):
        group.update(values)
    fill_momentum(optimizer)
    if any(group.get('fused') for group in optimizer.param_groups):
        _check_fused(optimizer)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                layout = parameter if value.shape == parameter.shape else value
                values[name] = torch.empty_like(layout, dtype=value.dtype).copy_(value)
