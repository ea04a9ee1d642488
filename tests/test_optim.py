"""Loading the state of optimisers, and what torch's fused ones need to be safe."""
import copy
import warnings

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers

from timm_cgh.optim import fill_momentum, load_optimizer


@pytest.fixture
def unwritten_memory_is_nan(monkeypatch):
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, 'fill_uninitialized_memory', True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('nesterov', [False, True])
def test_a_first_step_that_a_scaler_passes_over_leaves_no_momentum(nesterov, unwritten_memory_is_nan):
    torch.manual_seed(0)
    start, gradients = torch.randn(1000), [torch.randn(1000) for _ in range(3)]
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    plain = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([plain], **options)
    for gradient in gradients:
        plain.grad = gradient.clone()
        optimizer.step()

    scaled = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([scaled], fused=True, **options)
    fill_momentum(optimizer)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 16)
    for gradient in [torch.full((1000,), 1e38), *gradients]:  # the first is infinite when scaled
        optimizer.zero_grad()
        scaler.scale((scaled * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(scaled, plain)


@pytest.mark.parametrize('optimizer', [torch.optim.SGD, torch.optim.AdamW])
def test_a_state_saved_in_another_memory_layout_is_the_same_state(optimizer):
    """Fused optimisers read memory in its order, whatever the strides say."""
    torch.manual_seed(0)
    images, options = torch.randn(2, 8, 6, 6), dict(momentum=0.9) if optimizer is torch.optim.SGD else {}

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()

    model = torch.nn.Conv2d(8, 16, 3)
    plain = optimizer(model.parameters(), lr=0.1, fused=True, **options)
    steps(model, plain, 2)
    other = torch.nn.Conv2d(8, 16, 3)
    other.load_state_dict(model.state_dict())
    other.to(memory_format=torch.channels_last)
    resumed = optimizer(other.parameters(), lr=0.1, fused=True, **options)
    load_optimizer(resumed, copy.deepcopy(plain.state_dict()))
    steps(model, plain, 2)
    steps(other, resumed, 2)
    assert torch.allclose(other.weight, model.weight, atol=1e-5) and not other.weight.is_contiguous()


def test_a_resume_takes_the_averages_and_leaves_the_settings():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    saved = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    model(torch.randn(2, 4)).sum().backward()
    saved.step()
    decayed, bare = [model.weight], [model.bias]
    groups = [dict(params=decayed, weight_decay=0.1), dict(params=bare, weight_decay=0.0)]
    resumed = torch.optim.SGD(groups, lr=0.5, momentum=0.5, nesterov=True, fused=True)
    state = copy.deepcopy(saved.state_dict())
    with pytest.raises(ValueError):
        load_optimizer(resumed, state)  # other groups
    state['param_groups'] = [dict(state['param_groups'][0], params=[i]) for i in range(2)]
    load_optimizer(resumed, state)
    assert [(g['lr'], g['momentum'], g['weight_decay'], g['nesterov']) for g in resumed.param_groups] == [
        (0.5, 0.5, 0.1, True), (0.5, 0.5, 0.0, True)]
    for parameter in model.parameters():
        assert torch.equal(resumed.state[parameter]['momentum_buffer'], saved.state[parameter]['momentum_buffer'])


def test_momentum_that_comes_with_a_resume_starts_from_zero(unwritten_memory_is_nan):
    parameter = torch.nn.Parameter(torch.zeros(8))
    parameter.grad = torch.ones(8)
    saved = torch.optim.SGD([parameter], lr=0.1)
    saved.step()
    resumed = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=True)
    load_optimizer(resumed, saved.state_dict())
    assert torch.equal(resumed.state[parameter]['momentum_buffer'], torch.zeros(8))


@pytest.mark.parametrize('there,here', [(torch.optim.SGD, torch.optim.AdamW), (torch.optim.AdamW, torch.optim.SGD)])
def test_the_state_of_another_optimiser_is_refused(there, here):
    parameter = torch.nn.Parameter(torch.zeros(8))
    parameter.grad = torch.ones(8)
    saved = there([parameter], lr=0.1)
    saved.step()
    with pytest.raises(ValueError, match='another optimiser'):
        load_optimizer(here([parameter], lr=0.1), saved.state_dict())


def train_steps(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        torch.manual_seed(step)  # some optimisers draw numbers
        model(torch.randn(4, 3, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def usable(name):
    """Optimisers that train.py can use: apex's need the package, a few need closures or second derivatives."""
    return not name.startswith(('fused', 'bnb', 'adahessian', 'kron'))


@pytest.mark.parametrize('name', [name for name in list_optimizers() if usable(name)]
                         + ['lookahead_momentum', 'lookahead_adamw', 'adagrad fused'])
def test_every_timm_optimiser_continues_exactly_after_a_resume(name):
    name, *fused = name.split()

    def create():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 8))
        return model, create_optimizer_v2(
            model, name, lr=0.01, weight_decay=0.01, **dict.fromkeys(fused, True))

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model, optimizer = create()
        train_steps(model, optimizer, range(8))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train_steps(model, optimizer, range(8, 12))
        resumed, other = create()
        resumed.load_state_dict(saved[0])
        load_optimizer(other, saved[1])
        train_steps(resumed, other, range(8, 12))
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize('optimizer', [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize('damage', ['shape', 'missing', 'extra', 'number'])
def test_state_that_a_fused_kernel_would_read_out_of_bounds_is_refused(optimizer, damage):
    parameter = torch.nn.Parameter(torch.zeros(8, 8))
    parameter.grad = torch.ones(8, 8)
    options = dict(momentum=0.9) if optimizer is torch.optim.SGD else {}
    saved = optimizer([parameter], lr=0.1, fused=True, **options)
    saved.step()
    state = copy.deepcopy(saved.state_dict())
    values = state['state'][0]
    name = 'momentum_buffer' if optimizer is torch.optim.SGD else 'exp_avg'
    if damage == 'missing':
        if optimizer is torch.optim.SGD:
            pytest.skip('a missing momentum is 0')
        del values[name]
    elif damage == 'extra':
        values['surplus'] = torch.zeros(8, 8)
    else:
        values[name] = dict(shape=torch.zeros(2), number=1.0)[damage]
    with pytest.raises(ValueError, match='surplus' if damage == 'extra' else 'exp_avg|momentum_buffer|step'):
        load_optimizer(optimizer([parameter], lr=0.1, fused=True, **options), state)
