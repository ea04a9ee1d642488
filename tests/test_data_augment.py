"""Every photometric operation is torchvision's, whatever else is in the batch."""
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from timm_cgh.data import Photometric, ViewsToDevice, augment
from timm_cgh.data.augment import adjust_hue, gaussian_blur, photometric, to_gray
from timm_cgh.data.loader import Batch
from timm_cgh.data.views import BLUR_SIGMA, GRAYSCALE, JITTER_ORDER, JITTER_ORDERS


def images(batch=6, chans=3, size=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (batch, chans, size, size), dtype=torch.uint8, generator=generator)
    x[0, :, :3] = 77  # grey pixels, whose hue is undefined
    x[-1] = 255
    return x


def row(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, order=-1, gray=0, sigma=0.0):
    return [brightness, contrast, saturation, hue, order, gray, sigma]


def reference(image, params):
    """One image after the other through torchvision's functions."""
    x = image.float() / 255
    factors, order, gray, sigma = params[:4].tolist(), int(params[JITTER_ORDER]), params[GRAYSCALE], params[BLUR_SIGMA]
    operations = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for operation in JITTER_ORDERS[order] if order >= 0 else ():
        x = operations[operation](x, factors[operation])
    if gray:
        x = F.rgb_to_grayscale(x, len(x))
    if sigma > 0:
        reach = math.ceil(3 * sigma)
        x = F.gaussian_blur(x, [2 * reach + 1] * 2, [float(sigma)] * 2)
    return x


def check(x, params):
    params = torch.tensor(params)
    expected = torch.stack([reference(*pair) for pair in zip(x, params)])
    torch.testing.assert_close(photometric(x, params), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('chans', [1, 3])
@pytest.mark.parametrize('change', [
    dict(brightness=1.4), dict(brightness=0.0), dict(contrast=0.6), dict(contrast=1.4), dict(saturation=0.0),
    dict(saturation=1.4), dict(hue=0.1), dict(hue=-0.5), dict(hue=0.5), dict(gray=1), dict(sigma=0.1), dict(sigma=2.0),
])
def test_each_operation_equals_torchvisions(change, chans):
    x = images(chans=chans)
    if chans == 1 and change == {'gray': 1}:
        assert torch.equal(photometric(x, torch.tensor([row(gray=1)] * 6)), x.float().div(255))
    else:
        check(x, [row(**{'order': 0, **change})] * len(x))


def test_all_orders_in_one_batch_equal_torchvisions_jitter():
    check(images(24), [row(1.3, 0.7, 1.2, 0.08, order) for order in range(24)])


@pytest.mark.parametrize('chans', [1, 3])
def test_drawn_batches_equal_torchvision_image_by_image(chans):
    spec, rng = Photometric(grayscale_prob=0.2 if chans == 3 else 0.0), np.random.default_rng(1)
    check(images(48, chans, size=17), [spec.draw(rng).tolist() for _ in range(48)])


def test_augmented_image_does_not_depend_on_its_batch():
    rng = np.random.default_rng(2)
    params = torch.from_numpy(np.stack([Photometric().draw(rng) for _ in range(12)]))
    x = images(12)
    alone = torch.cat([photometric(x[i:i + 1], params[i:i + 1]) for i in range(12)])
    torch.testing.assert_close(photometric(x, params), alone, rtol=0, atol=1e-6)


def test_parts_that_fit_the_cache_and_the_order_in_memory_change_nothing(monkeypatch):
    rng = np.random.default_rng(4)
    params = torch.from_numpy(np.stack([Photometric().draw(rng) for _ in range(12)]))
    x, mean, std = images(12), torch.rand(1, 3, 1, 1), torch.rand(1, 3, 1, 1) + 0.1
    together = photometric(x, params, mean, std)
    alone = F.normalize(photometric(x, params), mean.flatten().tolist(), std.flatten().tolist())
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    for values in (1, 2 * x[0].numel(), 5 * x[0].numel()):
        monkeypatch.setattr(augment, '_CACHED', values)
        parts = photometric(x.contiguous(memory_format=torch.channels_last), params, mean, std)
        assert parts.is_contiguous()
        torch.testing.assert_close(parts, together, rtol=0, atol=1e-5)


def test_unchanged_images_are_exactly_the_pixels():
    x = images()
    assert torch.equal(photometric(x, None), x.float() / 255)
    assert torch.equal(photometric(x, torch.tensor([row()] * 6)), x.float() / 255)


def test_input_is_not_modified():
    x = images()
    before = x.clone()
    photometric(x, torch.tensor([row(1.4, 0.6, 0.5, 0.1, 7, 1, 1.0)] * 6))
    assert torch.equal(x, before)


@pytest.mark.parametrize('shape', [(1, 1), (2, 2), (5, 8), (8, 3), (57, 130), (112, 59)])
def test_blur_reflects_as_often_as_tiny_images_need_and_joins_the_bands_of_large_ones(shape):
    x, sigma, reach = torch.rand(2, 3, *shape), torch.tensor([2.0, 1.0]), 6
    offsets = np.arange(-reach, reach + 1)
    for image, s, blurred in zip(x.double().numpy(), sigma.tolist(), gaussian_blur(x, sigma, reach)):
        width = math.ceil(3 * s)
        kernel = np.exp(-offsets ** 2 / (2 * s * s)) * (abs(offsets) <= width)
        kernel /= kernel.sum()
        padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode='reflect')
        for axis in (1, 2):
            padded = np.apply_along_axis(np.convolve, axis, padded, kernel, mode='valid')
        np.testing.assert_allclose(blurred.numpy(), padded, atol=1e-6)


def test_hue_of_every_coarse_colour_equals_torchvisions():
    levels = torch.linspace(0, 1, 9)
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 27, 27)  # all ties and all greys among them
    for shift in (-0.5, -0.33, 0.0, 0.1, 0.5):
        torch.testing.assert_close(
            adjust_hue(colours.clone(), torch.tensor([shift])), F.adjust_hue(colours, shift), atol=1e-5, rtol=0)


@pytest.mark.parametrize('name, operation', [
    ('brightness', F.adjust_brightness),
    ('contrast', F.adjust_contrast),
    ('saturation', F.adjust_saturation),
    ('gray', lambda image, _: F.rgb_to_grayscale(image, 3)),
    ('sigma', lambda image, sigma: F.gaussian_blur(image, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)),
])
def test_8_bit_torchvision_on_pil_images_is_within_2_of_255(name, operation):
    """torchvision rounds to 8 bits after every operation, ours never does (its 8-bit HSV makes hue incomparable)."""
    pixels = images()
    for value in (0.6, 1.0, 1.4):
        ours = photometric(pixels, torch.tensor([row(order=0, **{name: value})] * len(pixels))) * 255
        for image, result in zip(pixels, ours):
            expected = F.pil_to_tensor(operation(F.to_pil_image(image), value))
            assert (expected.float() - result).abs().max() <= 2


def test_hue_shift_is_the_same_in_any_range():
    x, shift = torch.rand(5, 3, 9, 9), torch.linspace(-0.5, 0.5, 5)
    torch.testing.assert_close(adjust_hue(255 * x, shift), 255 * adjust_hue(x, shift), rtol=0, atol=1e-3)


def test_whole_turn_of_the_hue_changes_nothing_and_a_third_swaps_the_channels():
    x = torch.rand(4, 3, 9, 9)
    torch.testing.assert_close(adjust_hue(x, torch.tensor([0.0, 1.0, -1.0, 2.0])), x, rtol=0, atol=1e-5)
    third = adjust_hue(x, torch.full((4,), 1 / 3))
    torch.testing.assert_close(third, x.roll(1, dims=1), rtol=0, atol=1e-5)  # red -> green -> blue -> red


# ---- parity of the distributions


@pytest.fixture(scope='module')
def scene():
    """A colourful picture, (3, 48, 48) uint8, with edges for the blur to soften."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((1, 3, 6, 6), dtype=np.float32))
    blocks = torch.nn.functional.interpolate(coarse, 48, mode='nearest')[0]
    return (255 * (0.15 + 0.6 * blocks)).round().to(torch.uint8)


def measures(images):
    """(B, 3, H, W) in [0, 1] -> what the operations change, per image: a dict of (B,) arrays."""
    luma = to_gray(images)
    value, least = images.amax(dim=1), images.amin(dim=1)
    red, green, blue = images.mean(dim=(2, 3)).unbind(1)
    colour = torch.complex(red - (green + blue) / 2, math.sqrt(0.75) * (green - blue))
    contrast = luma.std(dim=(1, 2, 3))
    edges = luma.diff(dim=3).square().mean(dim=(1, 2, 3)) / contrast ** 2
    return dict(
        mean=images.mean(dim=(1, 2, 3)).numpy(),
        contrast=(contrast / luma.mean(dim=(1, 2, 3))).numpy(),
        saturation=((value - least) / value.clamp(min=1e-3)).mean(dim=(1, 2)).numpy(),
        hue=colour.angle()[colour.abs() > 1e-4].numpy(),
        blur=edges.numpy(),
    )


PICTURES = 600


@pytest.fixture(scope='module')
def torchvisions(scene):
    """Measures of the picture after torchvision's usual transforms."""
    recipe = transforms.Compose([
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2))], p=0.5),
    ])
    torch.manual_seed(1)
    return measures(torch.stack([recipe(scene / 255) for _ in range(PICTURES)]))


def p_values(scene, torchvisions, recipe):
    """Of Kolmogorov-Smirnov: whether the measures after our recipe come from torchvision's distribution."""
    rng = np.random.default_rng(1)
    params = torch.from_numpy(np.stack([recipe.draw(rng) for _ in range(PICTURES)]))
    ours = measures(photometric(scene.expand(PICTURES, -1, -1, -1), params))
    return {name: stats.ks_2samp(ours[name], torchvisions[name]).pvalue for name in ours}


def test_augmented_images_are_distributed_as_torchvisions(scene, torchvisions):
    found = p_values(scene, torchvisions, Photometric())
    assert min(found.values()) > 1e-3, found


@pytest.mark.parametrize('changed, by', [
    ('mean', dict(color_jitter=(0.2, 0.4, 0.4, 0.1))),
    ('contrast', dict(color_jitter=(0.4, 0.2, 0.4, 0.1))),
    ('saturation', dict(grayscale_prob=0.4)),
    ('hue', dict(color_jitter=(0.4, 0.4, 0.4, 0.2))),
    ('blur', dict(gaussian_blur_sigma=(0.1, 1.0))),
])
def test_distributions_of_another_recipe_are_told_apart(scene, torchvisions, changed, by):
    assert p_values(scene, torchvisions, Photometric(**by))[changed] < 1e-3


def test_gray_of_gray_is_itself():
    x = torch.rand(2, 1, 4, 4)
    assert to_gray(x) is x


def test_result_is_float32_under_autocast():
    x, params = images(), torch.tensor([row(1.4, 0.6, 0.5, 0.1, 7, 0, 1.0)] * 6)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed = photometric(x, params)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, photometric(x, params))


@pytest.mark.parametrize('chans', [1, 3])
def test_views_arrive_normalised(chans):
    mean, std = [0.5, 0.4, 0.3][:chans], [0.2, 0.25, 0.3][:chans]
    weak, strong = images(chans=chans), images(chans=chans, seed=1)
    params = torch.tensor([row(0.6, 1.3, 1, 0, 3, 0, 1.5)] * 6)
    batch = Batch([weak, strong], [None, params], torch.zeros(6), torch.zeros(6), [])
    views = ViewsToDevice(mean, std, 'cpu')(batch)
    for view, expected in zip(views, (weak.float() / 255, photometric(strong, params))):
        torch.testing.assert_close(view, F.normalize(expected, mean, std), rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_gives_the_same_without_a_synchronization():
    rng = np.random.default_rng(3)
    params = torch.from_numpy(np.stack([Photometric().draw(rng) for _ in range(64)]))
    x = images(64, size=32)
    batch = Batch([x.pin_memory(), x.pin_memory()], [None, params], torch.zeros(64), torch.zeros(64), [])
    to_device = ViewsToDevice([0.5] * 3, [0.2] * 3, 'cuda')
    to_device(batch)
    torch.cuda.set_sync_debug_mode('error')
    try:
        views = to_device(batch)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    expected = ViewsToDevice([0.5] * 3, [0.2] * 3, 'cpu')(batch)
    for view, other in zip(views, expected):
        torch.testing.assert_close(view.cpu(), other, rtol=0, atol=1e-4)
