"""A JPEG file is decoded no larger than its views need, and they stay nearly the same; with either decoder."""
import io
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data_files import encode
from timm_cgh.data import decode, open_dataset, two_views, views
from timm_cgh.data.decode import decode_pixels, read_image
from timm_cgh.data.views import ViewSpec, cut_views, draw_crop, view_rng


@pytest.fixture(params=['simplejpeg', 'Pillow'])
def decoder(request, monkeypatch):
    if request.param == 'Pillow':
        monkeypatch.setattr(decode, 'simplejpeg', None)
    else:
        pytest.importorskip('simplejpeg')
    return request.param


def smooth(width=333, height=250, seed=0):
    """A picture as smooth as a photograph, with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, 12, 16), dtype=np.float32))
    pixels = F.interpolate(coarse, (height, width), mode='bicubic').clamp(0, 1) * 255
    pixels = pixels[0].permute(1, 2, 0).numpy() + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image, **options):
    return encode(image, 'JPEG', **{'quality': 90, **options})


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize('options', [dict(subsampling=0), dict(subsampling=2), dict(progressive=True)])
@pytest.mark.parametrize('reduction', [1, 2, 4, 8])
def test_pixels_of_the_reduced_size_equal_pillows(decoder, options, reduction):
    data = jpeg(smooth(), **options)
    pixels, done = decode_pixels(opened(data), 'RGB', reduction)
    expected = opened(data)
    expected.draft('RGB', (333 // reduction, 250 // reduction))
    assert done == reduction and pixels.shape == (-(-250 // reduction), -(-333 // reduction), 3)
    assert np.array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize('saved, mode', [('L', 'RGB'), ('RGB', 'L'), ('L', 'L'), ('CMYK', 'RGB'), ('CMYK', 'L')])
def test_pixels_have_the_asked_mode(decoder, saved, mode):
    data = jpeg(smooth().convert(saved))
    pixels, _ = decode_pixels(opened(data), mode)
    expected = np.asarray(opened(data).convert(mode))
    assert pixels.shape == (250, 333, 3 if mode == 'RGB' else 1) and pixels.dtype == np.uint8
    assert abs(pixels.squeeze().astype(int) - expected).mean() < 1  # luma of the file, or of its clipped colours


def test_images_of_other_formats_and_decoded_ones_keep_their_size(decoder):
    decoded = opened(jpeg(smooth()))
    decoded.load()
    for image in (opened(encode(smooth())), decoded, smooth()):
        pixels, reduction = decode_pixels(image, 'RGB', 4)
        assert reduction == 1 and np.array_equal(pixels, np.asarray(image))


def test_first_of_several_images_in_a_file_is_decoded(decoder):
    data = encode(smooth(), 'MPO', save_all=True, append_images=[smooth(seed=1)])
    assert opened(data).format == 'MPO'
    pixels, reduction = decode_pixels(opened(data), 'RGB', 2)
    assert reduction == 2 and abs(pixels.astype(int) - np.asarray(smooth().reduce(2))).mean() < 4


def test_truncated_file_is_refused_and_one_with_extra_bytes_is_read(decoder):
    data = jpeg(smooth())
    with pytest.raises(OSError, match='truncated'):
        decode_pixels(opened(data[:-400]), 'RGB')
    blemished = data[:-2] + b'some bytes too many' + data[-2:]
    assert np.array_equal(decode_pixels(opened(blemished), 'RGB')[0], np.asarray(opened(data)))


@pytest.fixture
def cuts(monkeypatch):
    """Calls that `cut_views` makes from here on: (pixels, reduction) of each decoding, (box, size) of each view."""
    decoded, boxes = [], []
    decode_now, resize_now = views.decode_pixels, views._resized_crop

    def decode_and_note(*args):
        decoded.append(decode_now(*args))
        return decoded[-1]

    def resize_and_note(pixels, box, size, interpolation):
        boxes.append((box, size))
        return resize_now(pixels, box, size, interpolation)

    monkeypatch.setattr(views, 'decode_pixels', decode_and_note)
    monkeypatch.setattr(views, '_resized_crop', resize_and_note)
    return decoded, boxes


def test_image_is_decoded_once_and_no_larger_than_its_most_demanding_view_needs(decoder, cuts):
    decoded, _ = cuts
    whole = dict(scale=(1, 1), ratio=(1.33, 1.34))  # 333 x 250 px
    for sizes, reduction in (([126, 8], 1), ([125, 125], 2), ([62, 40, 8], 4), ([31], 8), ([8], 8)):
        result, _ = cut_views(opened(jpeg(smooth())), [ViewSpec(size, **whole) for size in sizes], 0, 0, 0)
        assert [tuple(view.shape) for view in result] == [(3, size, size) for size in sizes]
        (pixels, done), = decoded
        assert done == reduction and pixels.shape[:2] == (-(-250 // reduction), -(-333 // reduction))
        decoded.clear()


def test_crops_of_a_reduced_image_enlarge_nothing_and_move_less_than_a_pixel_of_the_view(cuts):
    decoded, boxes = cuts
    reduced = 0
    for index in range(150):
        width, height = np.random.default_rng(index).integers(40, 200, 2).tolist()
        specs = [ViewSpec(size, scale=(0.3, 1)) for size in (7, 12, 17)]
        cut_views(opened(jpeg(smooth(width, height))), specs, 0, 0, index)
        pixels, reduction = decoded.pop()
        for number, (box, size) in enumerate(boxes):
            drawn = draw_crop(view_rng(0, 0, index, number), width, height, (0.3, 1), (3 / 4, 4 / 3))
            sides = np.subtract(drawn[2:], drawn[:2])
            assert (np.subtract(box[2:], box[:2]) >= np.minimum(sides, size)).all()
            assert min(box) >= 0 and box[2] <= pixels.shape[1] and box[3] <= pixels.shape[0]
            moved = abs(np.multiply(box, reduction) - drawn)
            assert (moved < np.tile(sides, 2) / size).all() if reduction > 1 else not moved.any()
        boxes.clear()
        reduced += reduction > 1
    assert 50 < reduced < 150


def difference(image, data, specs, index, cuts):
    """Mean difference of an image's views from those of the same crops after a full decode, for each reduced one."""
    decoded, boxes = cuts
    decoded.clear(), boxes.clear()
    found, _ = cut_views(opened(data), specs, 0, 0, index)
    (_, reduction), = decoded
    full = np.asarray(image)
    for view, spec, (box, _) in zip(found, specs, boxes[:len(specs)]):
        edges = np.minimum(np.multiply(box, reduction), [*image.size, *image.size])
        expected = views._resized_crop(full, edges, spec.size, spec.interpolation)
        if reduction > 1:
            yield (view.float() - expected.float()).abs().mean().item()


def test_views_of_a_reduced_image_are_nearly_those_of_the_whole(decoder, cuts):
    specs = [ViewSpec(40, hflip=0), ViewSpec(60, hflip=0, interpolation='bicubic')]
    found = []
    for index in range(30):
        data = jpeg(smooth(333, 250, index))
        found.extend(difference(opened(data).convert('RGB'), data, specs, index, cuts))
    assert len(found) > 40 and np.mean(found) < 1.5 and max(found) < 3  # of 255


def test_views_of_reduced_photographs_are_nearly_those_of_the_whole(shared_data, cuts):
    dataset = open_dataset('', str(shared_data / 'imagenet-samples' / 'images.tar'))
    found = []
    for index in range(0, len(dataset), 4):
        file, _ = dataset.reader[index]
        data = file.read()
        specs = [ViewSpec(size, hflip=0) for size in ((24, 40), (64, 96), (128, 112))[index // 4 % 3]]
        found.extend(difference(opened(data).convert('RGB'), data, specs, index, cuts))
    assert len(found) > 60 and np.mean(found) < 3 and max(found) < 12  # of 255; bilinear and bicubic differ by 1.7


def cut_image(size, index, image, mode):
    return cut_views(image, two_views(size), 0, 0, index, mode)[0]


def test_both_decoders_give_the_same_views_of_photographs(shared_data, monkeypatch):
    pytest.importorskip('simplejpeg')
    dataset = open_dataset('', str(shared_data / 'imagenet-samples' / 'images.tar'))
    for size, mode in ((224, 'RGB'), (64, 'RGB'), (96, 'L')):
        for index in range(0, len(dataset), 8):
            cut = partial(cut_image, size, index)
            fast, _ = read_image(dataset, index, mode, cut)
            with monkeypatch.context() as patch:
                patch.setattr(decode, 'simplejpeg', None)
                slow, _ = read_image(dataset, index, mode, cut)
            assert all(torch.equal(view, other) for view, other in zip(fast, slow))
