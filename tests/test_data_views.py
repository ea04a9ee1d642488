"""The random choices about a view: which variables they depend on, and how they are distributed."""
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from data_files import picture
from input_errors import refused
from timm_cgh.data import Photometric, two_views
from timm_cgh.data.decode import Decoding
from timm_cgh.data.views import (
    BLUR_SIGMA, BRIGHTNESS, CONTRAST, GRAYSCALE, HUE, JITTER_ORDER, JITTER_ORDERS, SATURATION, ViewSpec, cut_views,
    draw_crop, view_rng)

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
IMAGE = picture(0, (40, 30))


def test_a_view_is_a_function_of_seed_epoch_index_and_view():
    base = (1, 2, 3, 4)
    draws = {base: view_rng(*base).random()}
    assert view_rng(*base).random() == draws[base]
    for place in range(4):
        for value in range(20, 30):
            key = (*base[:place], value, *base[place + 1:])
            draws[key] = view_rng(*key).random()
    assert len(set(draws.values())) == len(draws)


def test_a_view_does_not_depend_on_global_generators_or_on_the_other_views():
    specs = two_views(16)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global generator)
    views, rows = cut_views(IMAGE, specs, seed=1, epoch=2, index=3)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 (the global generator)
    again, rows_again = cut_views(IMAGE, [*specs, ViewSpec(8)], seed=1, epoch=2, index=3)
    assert all(torch.equal(a, b) for a, b in zip(views, again)) and again[2].shape == (3, 8, 8)
    assert torch.equal(rows[1], rows_again[1])
    other, _ = cut_views(IMAGE, specs, seed=1, epoch=3, index=3)
    assert not torch.equal(views[0], other[0]) and not torch.equal(views[0], views[1])


def test_views_are_uint8_of_the_asked_size_and_only_the_contrastive_one_has_parameters():
    for mode, chans in (('RGB', 3), ('L', 1)):
        views, rows = cut_views(IMAGE, two_views(20), 0, 0, 0, Decoding(mode))
        assert [tuple(v.shape) for v in views] == [(chans, 20, 20)] * 2
        assert all(v.dtype == torch.uint8 for v in views)
        assert rows[0] is None and rows[1].shape == (7,) and rows[1].dtype == torch.float32


def test_view_is_pillows_crop_resize_and_flip():
    image = picture(0, (64, 48))
    flipped = 0
    for index in range(12):
        spec = ViewSpec(16, interpolation='bicubic' if index % 2 else 'bilinear')
        view = cut_views(image, [spec], 0, 0, index)[0][0]
        rng = view_rng(0, 0, index, 0)
        box = draw_crop(rng, 64, 48, spec.scale, spec.ratio)
        method = Image.Resampling.BICUBIC if index % 2 else Image.Resampling.BILINEAR
        expected = np.array(image.crop(box).resize((16, 16), method)).transpose(2, 0, 1).astype(int)
        if rng.random() < 0.5:
            expected, flipped = expected[:, :, ::-1], flipped + 1
        assert abs(view.numpy() - expected).max() <= 1  # both round to 8 bits between the two axes
    assert 0 < flipped < 12


@pytest.mark.parametrize('width, height', [(1, 1), (1, 7), (7, 1), (2, 3), (1000, 2), (3, 999), (32, 32), (500, 333)])
@pytest.mark.parametrize('scale, ratio', [
    (SCALE, RATIO),
    ((0.001, 0.01), RATIO),
    ((1.0, 1.0), RATIO),
    (SCALE, (0.1, 0.2)),
    (SCALE, (5, 9)),
])
def test_crops_lie_inside_the_image_and_hold_a_pixel(width, height, scale, ratio):
    rng = np.random.default_rng(0)
    for _ in range(50):
        left, top, right, bottom = draw_crop(rng, width, height, scale, ratio)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    cut_views(picture(0, (width, height)), [ViewSpec(8, scale, ratio)], 0, 0, 0)


@pytest.mark.parametrize('width, height', [(64, 64), (500, 333), (200, 40)])
def test_crops_are_distributed_as_torchvisions(width, height):
    rng = np.random.default_rng(1)
    ours = np.array([draw_crop(rng, width, height, SCALE, RATIO) for _ in range(3000)])
    torch.manual_seed(1)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(3000)])  # top, left, h, w
    w, h = ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]
    for a, b in (
            (w * h, theirs[:, 2] * theirs[:, 3]),
            (w / h, theirs[:, 3] / theirs[:, 2]),
            (ours[:, 0], theirs[:, 1]),
            (ours[:, 1], theirs[:, 0]),
    ):
        assert stats.ks_2samp(a, b).pvalue > 1e-3


@pytest.mark.parametrize('probability', [0.0, 0.3, 1.0])
def test_flips_come_with_their_probability(probability):
    image = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (2, 1)))  # dark left, bright right
    spec = ViewSpec(2, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=probability)
    flips = sum(int(cut_views(image, [spec], 0, 0, i)[0][0][0, 0, 0] > 128) for i in range(1000))
    assert abs(flips / 1000 - probability) < 5 * math.sqrt(probability * (1 - probability) / 1000) + 1e-9


def test_photometric_rows_have_the_recipes_ranges_and_probabilities():
    rng = np.random.default_rng(0)
    rows = np.stack([Photometric().draw(rng) for _ in range(4000)])
    assert rows.dtype == np.float32
    for column in (BRIGHTNESS, CONTRAST, SATURATION):
        assert stats.kstest(rows[:, column], 'uniform', (0.6, 0.8)).pvalue > 1e-3
    assert stats.kstest(rows[:, HUE], 'uniform', (-0.1, 0.2)).pvalue > 1e-3
    order, gray, sigma = rows[:, JITTER_ORDER], rows[:, GRAYSCALE], rows[:, BLUR_SIGMA]
    assert abs((order >= 0).mean() - 0.8) < 0.03
    counts = np.bincount(order[order >= 0].astype(int), minlength=len(JITTER_ORDERS))
    assert stats.chisquare(counts).pvalue > 1e-3  # each of the 24 orders alike
    assert set(np.unique(gray)) == {0, 1} and abs(gray.mean() - 0.2) < 0.03
    assert abs((sigma > 0).mean() - 0.5) < 0.04
    assert stats.kstest(sigma[sigma > 0], 'uniform', (0.1, 1.9)).pvalue > 1e-3


def test_probabilities_0_and_1_are_exact_and_strong_brightness_stays_positive():
    rng = np.random.default_rng(0)
    never = np.stack([Photometric((3, 0, 0, 0), 0, 0, 0).draw(rng) for _ in range(200)])
    certain = Photometric(color_jitter_prob=1, grayscale_prob=1, gaussian_blur_prob=1)
    always = np.stack([certain.draw(rng) for _ in range(200)])
    assert (never[:, JITTER_ORDER] == -1).all() and not never[:, [GRAYSCALE, BLUR_SIGMA, HUE]].any()
    assert (never[:, BRIGHTNESS] >= 0).all() and (never[:, [CONTRAST, SATURATION]] == 1).all()
    assert (always[:, JITTER_ORDER] >= 0).all() and always[:, GRAYSCALE].all() and (always[:, BLUR_SIGMA] >= 0.1).all()


def test_two_views_are_a_weak_and_a_contrastive_one():
    weak, contrastive = two_views(32, scale=(0.1, 0.5), weak_scale=(0.5, 1), hflip=0.2)
    assert weak.photometric is None and weak.scale == (0.5, 1) and weak.hflip == contrastive.hflip == 0.2
    assert contrastive.photometric == Photometric() and contrastive.scale == (0.1, 0.5)
    assert two_views(32)[0].scale == (0.2, 1.0)


@pytest.mark.parametrize('name, value', [
    ('scale', (0.5, 0.2)),
    ('scale', (0.5, 2)),
    ('weak_scale', (0, 1)),
    ('ratio', (4 / 3, 3 / 4)),
    ('gaussian_blur_sigma', (2, 0.1)),
    ('hflip', 1.5),
    ('color_jitter_prob', 2),
    ('grayscale_prob', -0.1),
    ('gaussian_blur_prob', -1),
    ('color_jitter', (0.4, 0.4, 0.4, 0.6)),
])
def test_values_out_of_bounds_are_refused_by_name(name, value):
    with refused(name, 'must be'):
        two_views(32, **{name: value})
