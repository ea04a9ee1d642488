"""A JPEG file is decoded no larger than its views need, and they stay nearly the same; with either decoder."""
import io
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps

from data_files import encode, picture, write_shards
from timm_cgh.data import decode, open_dataset, two_views, views
from timm_cgh.data.decode import Decoding, decode_image, decode_pixels, read_image, to_uint8, upright_size
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
    pixels, done = decode_pixels(opened(data), reduction=reduction)
    expected = opened(data)
    expected.draft('RGB', (333 // reduction, 250 // reduction))
    assert done == reduction and pixels.shape == (-(-250 // reduction), -(-333 // reduction), 3)
    assert np.array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize('saved, mode', [('L', 'RGB'), ('RGB', 'L'), ('L', 'L'), ('CMYK', 'RGB'), ('CMYK', 'L')])
def test_pixels_have_the_asked_mode(decoder, saved, mode):
    data = jpeg(smooth().convert(saved))
    pixels, _ = decode_pixels(opened(data), Decoding(mode))
    expected = np.asarray(opened(data).convert(mode))
    assert pixels.shape == (250, 333, 3 if mode == 'RGB' else 1) and pixels.dtype == np.uint8
    assert abs(pixels.squeeze().astype(int) - expected).mean() < 1  # luma of the file, or of its clipped colours


def test_images_of_other_formats_and_decoded_ones_keep_their_size(decoder):
    decoded = opened(jpeg(smooth()))
    decoded.load()
    for image in (opened(encode(smooth())), decoded, smooth()):
        pixels, reduction = decode_pixels(image, reduction=4)
        assert reduction == 1 and np.array_equal(pixels, np.asarray(image))


def test_first_of_several_images_in_a_file_is_decoded(decoder):
    data = encode(smooth(), 'MPO', save_all=True, append_images=[smooth(seed=1)])
    assert opened(data).format == 'MPO'
    pixels, reduction = decode_pixels(opened(data), reduction=2)
    assert reduction == 2 and abs(pixels.astype(int) - np.asarray(smooth().reduce(2))).mean() < 4


def test_truncated_file_is_refused_and_one_with_extra_bytes_is_read(decoder):
    data = jpeg(smooth())
    with pytest.raises(OSError, match='truncated'):
        decode_pixels(opened(data[:-400]))
    blemished = data[:-2] + b'some bytes too many' + data[-2:]
    assert np.array_equal(decode_pixels(opened(blemished))[0], np.asarray(opened(data)))


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


def cut_image(size, index, image, decoding):
    return cut_views(image, two_views(size), 0, 0, index, decoding)[0]


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


def turned(image, orientation, format='JPEG'):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(image, format, exif=exif, **({'quality': 95} if format == 'JPEG' else {}))


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize('orientation', range(1, 10))  # 9 means nothing
def test_images_are_turned_as_their_exif_tag_says(decoder, orientation, format):
    data = turned(smooth(60, 40), orientation, format)
    expected = ImageOps.exif_transpose(opened(data))
    assert upright_size(opened(data), Decoding()) == expected.size
    assert np.array_equal(np.asarray(decode_image(opened(data))), np.asarray(expected))
    reduced, done = decode_pixels(opened(data), reduction=2)
    assert reduced.shape[1::-1] == tuple(-(-side // done) for side in expected.size)
    view, _ = cut_views(opened(data), [ViewSpec(20, scale=(1, 1), ratio=(0.6, 1.6), hflip=0)], 0, 0, 0)
    assert abs(view[0].float().mean(dim=(1, 2)) - torch.tensor(np.asarray(expected).mean(axis=(0, 1)))).max() < 20
    if format != 'TIFF':  # Pillow turns those itself
        stored = np.asarray(decode_image(opened(data), Decoding(exif_orientation=False)))
        assert np.array_equal(stored, np.asarray(opened(data)))


def test_broken_exif_is_no_reason_to_refuse_an_image(decoder):
    data = bytearray(turned(smooth(60, 40), 6))
    place = data.index(b'Exif') + 8
    data[place:place + 6] = b'\xff' * 6
    assert decode_image(opened(bytes(data))).size == (60, 40)


def test_grey_levels_depend_on_the_value_alone():
    deep = np.array([0, 800, 4095, 65535], dtype=np.uint16)
    assert to_uint8(deep).tolist() == [0, 3, 16, 255]
    assert to_uint8(deep, (0, 4095)).tolist() == [0, 50, 255, 255]
    kelvin = np.array([250, 285, 320, np.nan, np.inf, -np.inf, -9999], dtype=np.float32)
    assert to_uint8(kelvin, (250, 320)).tolist() == [0, 128, 255, 0, 255, 0, 0]
    assert to_uint8(np.float32([0, 0.5, 1, 1.001])).tolist() == [0, 128, 255, 255]
    assert to_uint8(np.int16([-1000, 0, 1000]), (-1000, 1000)).tolist() == [0, 128, 255]
    assert to_uint8(np.array([True, False])).tolist() == [255, 0]


def test_one_bad_pixel_leaves_the_others_as_they_are(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / 'a.tif')
    for name, bad in (('b', np.nan), ('c', np.inf), ('d', -9999)):
        Image.fromarray(np.where(values == 0, bad, values).astype(np.float32)).save(tmp_path / f'{name}.tif')
    dataset = open_dataset('', str(tmp_path), in_chans=1)
    clean, *others = (np.asarray(read_image(dataset, i)[0]) for i in range(4))
    assert len(np.unique(clean)) == 64
    assert all(np.array_equal(clean.ravel()[1:], other.ravel()[1:]) for other in others)


def test_pixel_range_holds_for_a_data_set(tmp_path):
    for name, level in (('dark', 1000), ('light', 4000)):
        Image.fromarray(np.full((4, 4), level, dtype=np.uint16)).save(tmp_path / f'{name}.png')
    read = [np.asarray(read_image(open_dataset('', str(tmp_path), pixel_range=(0, 4000)), i)[0]) for i in range(2)]
    assert [np.unique(pixels).tolist() for pixels in read] == [[64], [255]]
    colours = (np.asarray(picture(0)).astype(np.uint16) * 16)  # 12 bits
    pytest.importorskip('tifffile').imwrite(tmp_path / 'colours.tif', colours, photometric='rgb')
    dataset = open_dataset('', str(tmp_path), pixel_range=(0, 4080), input_key='.tif')
    assert np.array_equal(np.asarray(read_image(dataset, 0)[0]), np.asarray(picture(0)))


def test_images_of_too_many_pixels_name_the_parameter(tmp_path):
    picture(0, size=(30, 40)).save(tmp_path / 'a.png')
    assert read_image(open_dataset('', str(tmp_path), max_pixels=1200), 0)[0].size == (30, 40)
    with pytest.raises(ValueError, match='30 x 40 px, `max_pixels` is 1199'):
        read_image(open_dataset('', str(tmp_path), max_pixels=1199), 0)


def test_images_beyond_pillows_limit_are_read_when_that_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    picture(0, size=(30, 40)).save(tmp_path / 'a.png')
    assert read_image(open_dataset('', str(tmp_path)), 0)[0].size == (30, 40) and Image.MAX_IMAGE_PIXELS == 100


def test_five_bands_are_never_read_as_three(tmp_path):
    tifffile = pytest.importorskip('tifffile')
    bands = np.random.default_rng(0).integers(0, 256, (12, 10, 5), dtype=np.uint8)
    tifffile.imwrite(tmp_path / 'a.tif', bands, photometric='rgb', planarconfig='contig')
    tifffile.imwrite(tmp_path / 'b.tif', bands.transpose(2, 0, 1), photometric='minisblack', planarconfig='separate')
    tifffile.imwrite(tmp_path / 'c.tif', bands.astype(np.uint16) * 257, photometric='minisblack', planarconfig='contig')
    np.save(tmp_path / 'd.npy', bands)
    np.save(tmp_path / 'e.npy', bands.transpose(2, 0, 1) / 255)
    picture(0).save(tmp_path / 'f.png')
    dataset = open_dataset('', str(tmp_path), in_chans=5)
    for index in range(5):
        assert np.array_equal(read_image(dataset, index)[0], bands), index
    with pytest.raises(ValueError, match=r'its shape is \(16, 16, 3\), `in_chans` is 5'):
        read_image(dataset, 5)
    with pytest.raises(ValueError, match='5 bands, which `in_chans` 5 reads'):
        read_image(open_dataset('', str(tmp_path)), 0)
    views, _ = cut_views(bands, two_views(8), 0, 0, 0, Decoding('5'))
    assert [tuple(view.shape) for view in views] == [(5, 8, 8)] * 2


def test_shards_are_decoded_as_folders_are(tmp_path):
    deep = Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16))
    split = write_shards(tmp_path, images=[encode(deep), turned(smooth(60, 40), 6, 'PNG'), encode(picture(0, size=70))])
    dataset = open_dataset('wds/x', str(tmp_path), split, pixel_range=(0, 4000), max_pixels=2400)
    images = [image for image, _ in dataset]
    assert [image.size for image in images] == [(4, 4), (40, 60)] and images[0].getpixel((0, 0)) == (255, 255, 255)
    (named,) = dataset.reader.unreadable
    assert '70 x 70 px, `max_pixels` is 2400' in named
