"""What torch's fused optimisers need to be safe."""
import copy

import pytest
import torch

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
