"""The training step on torch's meta device, where reading a value raises, and so does mixing devices.

It shows, without a GPU, that the step is device-agnostic and never waits for the device.
"""
import contextlib

import numpy as np
import pytest
import torch

from timm_cgh import create_task
from timm_cgh.data import ViewsToDevice, multi_crop, two_views
from timm_cgh.data.loader import Batch
from timm_cgh.train.build import build_optimizer

META = torch.device('meta')


@pytest.fixture(autouse=True)
def autocast_takes_meta(monkeypatch):
    """torch.autocast does not know the meta device; all that our code asks of it there is to be off."""
    real = torch.autocast
    monkeypatch.setattr(torch, 'autocast', lambda device_type, *args, **kwargs: (
        contextlib.nullcontext() if device_type == 'meta' else real(device_type, *args, **kwargs)))


@pytest.mark.parametrize('options', [
    dict(context='cross'),
    dict(context='same'),
    dict(context='global'),
    dict(context='global', method='moco'),
    dict(predictor=True),
    dict(bn_splits=4),
    dict(contrast_warmup=10),
    dict(contrast_warmup=10, predictor=True, crops=True),
    dict(bank_labels=True),
], ids=str)
def test_the_step_reads_no_value_and_mixes_no_devices(options):
    crops = options.pop('crops', False)
    task = create_task('resnet10t', bank_size=64, hidden_dim=32, embed_dim=16, **options).to(META)
    optimizer = build_optimizer(task.student, True, opt='momentum', lr=0.1, momentum=0.9, weight_decay=1e-4,
                                fused=False)
    sizes = [32, 32, 24, 16] if crops else [32, 32]
    for _ in range(2):
        views = [torch.empty(8, 3, size, size, device=META) for size in sizes]
        result = task(views, torch.zeros(8, dtype=torch.long) if options.get('bank_labels') else None)
        assert all(value.device == META for value in result.values())
        result['loss'].backward()
        assert all(p.grad is not None for p in task.student.parameters())
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
    assert task.num_updates == 2


@pytest.mark.parametrize('chans', [1, 3])
def test_the_photometric_augmentation_reads_no_pixel(chans):
    specs = multi_crop(two_views(32), [32, 24])
    rng = np.random.default_rng(0)
    rows = [None if spec.photometric is None else torch.from_numpy(
        np.stack([spec.photometric.draw(rng) for _ in range(8)])) for spec in specs]
    batch = Batch(
        [torch.empty(8, chans, spec.size, spec.size, dtype=torch.uint8, device=META) for spec in specs],
        rows, torch.zeros(8), torch.arange(8), [])
    views = ViewsToDevice([0.5] * chans, [0.5] * chans, META)(batch)
    assert [(v.device, v.dtype, v.shape[-1]) for v in views] == [(META, torch.float32, s) for s in (32, 32, 24)]
