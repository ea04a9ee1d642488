"""Every kind of source opens to (PIL image, target) items, and what cannot be opened ends in one line."""
import os
import re
import shutil
import sys
import time

import numpy as np
import pytest
import timm
import torch.distributed as dist
from PIL import Image
from sklearn.datasets import load_digits
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset

from conftest import REPOSITORY
from data_files import encode, picture, write_classes, write_images, write_parquet, write_shards, write_tar
from input_errors import refused
from timm_cgh.data import Digits, image_mode, is_stream, num_images, open_dataset
from timm_cgh.data.decode import Decoding, decode_image, read_image, read_or_substitute
from timm_cgh.data.labels import fingerprint
from timm_cgh.errors import InputError, redact


class Opened(Dataset):
    """In place of a data set."""

    def __len__(self):
        return 1


PICTURES = {f'{i}.png': encode(picture(i)) for i in range(3)}


def test_digits_split_is_fixed_stratified_and_complete():
    train, test = Digits('train'), Digits('validation')
    assert len(train) + len(test) == 1797 and abs(len(test) - 360) < 10
    counts = np.bincount(test.targets) / (np.bincount(test.targets) + np.bincount(train.targets))
    assert ((counts > 0.19) & (counts < 0.21)).all()
    assert (Digits('train').images == train.images).all()
    both = np.concatenate([train.images, test.images]).reshape(1797, -1)
    assert sorted(map(bytes, both)) == sorted(map(bytes, np.round(load_digits().data * 255 / 16).astype(np.uint8)))


def test_digits_are_those_of_scikit_learn():
    theirs = load_digits()
    with np.load(REPOSITORY / 'timm_cgh' / 'data' / 'digits.npz') as ours:
        assert np.array_equal(ours['images'], theirs.images) and np.array_equal(ours['labels'], theirs.target)


@pytest.mark.parametrize('chans,mode', [(1, 'L'), (3, 'RGB')])
def test_digits_have_the_mode_of_the_channels(chans, mode):
    image, label = open_dataset('digits', None, 'train', in_chans=chans)[0]
    assert (image.mode, image.size) == (mode, (8, 8)) and label in range(10)
    assert np.asarray(image).max() > 200


def test_folder_takes_its_split_folder_by_name_or_synonym(tmp_path):
    write_classes(tmp_path / 'training', 3)
    write_classes(tmp_path / 'val', 2, first=50)
    assert len(open_dataset('', tmp_path.as_posix(), 'train')) == 6
    assert len(open_dataset('', tmp_path.as_posix(), 'validation')) == 4


def test_flat_folder_opens(tmp_path):
    dataset = open_dataset('', str(write_images(tmp_path / 'flat', 4)), None)
    image, target = dataset[0]
    assert len(dataset) == 4 and image.mode == 'RGB' and target == -1


def test_tar_opens_and_stays_closed_between_reads(tmp_path):
    path = write_tar(tmp_path / 'images.tar', write_classes(tmp_path / 'images', 2))
    dataset = open_dataset('', str(path), 'train', in_chans=1)
    assert len(dataset) == 4 and dataset[3][0].mode == 'L'
    assert dataset.reader[3][0].read() == dataset.reader[3][0].read()


def test_images_in_a_tar_and_in_a_tar_within_it_are_those_that_timm_reads(tmp_path):
    write_classes(tmp_path / 'inner', 2)
    write_tar(tmp_path / 'inner' / 'bird.tar', write_classes(tmp_path / 'more', 3, first=40))
    path = str(write_tar(tmp_path / 'images.tar', tmp_path / 'inner'))
    dataset, reference = open_dataset('', path), ReaderImageInTar(path, cache_tarfiles=False)
    assert len(dataset) == len(reference) == 10
    for index in range(10):
        (file, target), (timms, timms_target) = dataset.reader[index], reference[index]
        assert file.read() == timms.read() and target == timms_target


def test_tar_inside_a_folder_of_splits(tmp_path):
    write_tar(tmp_path / 'part.tar', write_classes(tmp_path / 'elsewhere', 2))
    assert len(open_dataset('', str(tmp_path), 'part.tar')) == 4


def test_webdataset_stream_counts_images_not_rounded_batches(tmp_path):
    split = write_shards(tmp_path, 12)
    dataset = open_dataset('wds/', str(tmp_path), split, is_training=True, batch_size=16)
    assert is_stream(dataset) and num_images(dataset) == 24 != len(dataset)


def test_torchvision_sets_open(tmp_path):
    root = tmp_path / 'MNIST' / 'raw'
    root.mkdir(parents=True)
    for part, count in (('train', 4), ('t10k', 2)):
        images = np.arange(count * 784).astype(np.uint8)
        (root / f'{part}-images-idx3-ubyte').write_bytes(
            b'\0\0\x08\x03' + np.array([count, 28, 28], '>i4').tobytes() + images.tobytes())
        (root / f'{part}-labels-idx1-ubyte').write_bytes(
            b'\0\0\x08\x01' + np.array([count], '>i4').tobytes() + bytes(range(count)))
    dataset = open_dataset('torch/mnist', str(tmp_path), 'train')
    image, target = read_image(dataset, 3, 'RGB')  # the file is grey
    assert (len(dataset), image.mode, target) == (4, 'RGB', 3)
    assert len(open_dataset('torch/MNIST', str(tmp_path), 'validation')) == 2
    with refused('val_split=half', 'train and validation'):
        open_dataset('torch/mnist', str(tmp_path), 'half', split_parameter='val_split')


def test_stl10_trains_on_the_unlabelled_images_too(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr('timm_cgh.data.sources.STL10', lambda root, split, download: made.append(split) or Opened())
    for split in ('train', None, 'validation', 'unlabeled'):
        open_dataset('torch/stl10', str(tmp_path), split)
    assert made == ['train+unlabeled', 'train+unlabeled', 'test', 'unlabeled']


def test_parquet_folder_opens_as_hfds(shared_data, tmp_path):
    dataset = open_dataset(f"hfds/{shared_data / 'cifar10'}", str(tmp_path), 'test[:20]')
    assert len(dataset) == 20 and read_image(dataset, 0, 'RGB')[0].size == (32, 32)
    with refused('train_split=nonsense'):
        open_dataset(f"hfds/{shared_data / 'cifar10'}", str(tmp_path), 'nonsense')


@pytest.mark.parametrize('key', [None, 'fine'])
def test_an_image_column_of_another_name_is_asked_for(tmp_path, key):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'img': datasets.Image(), 'fine': datasets.Value('int64')})
    files = [{'path': name, 'bytes': data} for name, data in PICTURES.items()]
    table = datasets.Dataset.from_dict({'img': files, 'fine': [0] * len(files)}, features=features)
    (tmp_path / 'set').mkdir()
    table.to_parquet(str(tmp_path / 'set' / 'train-00000-of-00001.parquet'))
    with refused(f"input_key={key or 'image'}", 'img, fine', 'img holds images'):
        open_dataset(f"hfds/{tmp_path / 'set'}", str(tmp_path / 'cache'), input_key=key)
    assert len(open_dataset(f"hfds/{tmp_path / 'set'}", str(tmp_path / 'cache'), input_key='img')) == len(files)


def test_logins_are_left_out_of_messages():
    command = "pipe:curl -H 'Authorization: Bearer SECRET' https://u:SECRET@host/a-{0..1}.tar"
    with refused('train_split=pipe:curl ***|9', 'the reason') as caught:
        raise InputError(f'train_split={command}|9: the reason')
    for text, kept in (
            (str(caught.value), 'curl'),
            (redact('https://me:SECRET@host/x.tar?token=SECRET&a=1 failed'), 'host/x.tar?*** failed'),
            (redact(dict(a=dict(b='s3://SECRET@bucket/x')))['a']['b'], 's3://***@bucket/x'),
    ):
        assert 'SECRET' not in text and kept in text
    assert redact(dict(a=[1], b=None)) == dict(a=[1], b=None) and redact('/a@b/c?d') == '/a@b/c?d'


def test_hfds_without_labels_opens_unlabelled(tmp_path):
    source = f"hfds/{write_parquet(tmp_path / 'set', PICTURES)}", str(tmp_path / 'cache')
    assert read_image(open_dataset(*source), 1, 'RGB')[1] == -1
    with refused('target_key=kind', 'image'):
        open_dataset(*source, target_key='kind')


@pytest.mark.parametrize('name,root,split,named', [
    ('', 'missing', 'train', ('data_dir', 'missing', 'no such')),
    ('', 'empty', 'train', ('data_dir', 'empty', '0 images')),
    ('', None, 'train', ('data_dir',)),
    ('', 'notes.txt', 'train', ('data_dir', 'notes.txt', '.tar')),
    ('', 'empty.tar', 'train', ('data_dir', 'empty.tar')),
    ('', 'images', 'half', ('train_split=half', 'cat, dog')),
    ('', 'images.tar', 'val', ('train_split=val', 'no splits')),
    ('cifar10', 'images', 'train', ('dataset=cifar10', 'torch/cifar10')),
    ('timm/x', 'images', 'train', ('dataset=timm/x', 'hfds/')),
    ('digits', None, 'half', ('train_split=half', 'validation')),
    ('torch/nothing', 'images', 'train', ('dataset=torch/nothing', 'cifar10', 'stl10')),
    ('torch/cifar10', None, 'train', ('data_dir', 'torch/cifar10')),
    ('torch/cifar10', 'images', 'train', ('dataset=torch/cifar10', '`dataset_download`')),
    ('torch/stl10', 'images', 'train', ('dataset=torch/stl10', '`dataset_download`')),
    ('torch/image_folder', 'empty', 'train', ('dataset=torch/image_folder',)),
    ('hfds/./missing', None, 'train', ('dataset=hfds/./missing', 'no such folder')),
    ('wds/', 'missing', 'train', ('data_dir', 'missing')),
    ('wds/', 'images', 'shard-{000000..000001}.tar|24', ('data_dir', 'shard-000000.tar')),
    ('wds/', 'shards', 'shard-{000000..000001}.tar', ('num_samples',)),
    ('wds/', 'shards', 'half', ('train_split=half', '.tar|13000', 'shard-000000.tar')),
])
def test_a_source_that_cannot_be_opened_is_refused_in_one_line(tmp_path, monkeypatch, name, root, split, named):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / 'images', 2)
    write_tar(tmp_path / 'images.tar', tmp_path / 'images')
    (tmp_path / 'empty').mkdir()
    write_tar(tmp_path / 'empty.tar', tmp_path / 'empty')
    write_shards(tmp_path / 'shards', 1)
    (tmp_path / 'notes.txt').write_text('no image')
    with refused(*named):
        open_dataset(name, root and str(tmp_path / root), split, is_training=True)


@pytest.mark.parametrize('name', ['hfds/nothing', 'hfds/timm/nothing', 'hfids/timm/nothing'])
def test_names_of_the_hub_are_refused_at_once_when_offline(tmp_path, monkeypatch, name):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    hub = pytest.importorskip('huggingface_hub')
    monkeypatch.setattr(hub.constants, 'HF_HUB_OFFLINE', True)
    start = time.perf_counter()
    with refused(f'dataset={name}'):
        open_dataset(name, str(tmp_path))
    assert time.perf_counter() - start < 3


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
    with refused('dataset=tfds/mnist', 'pip install tensorflow-datasets'):
        open_dataset('tfds/mnist', str(tmp_path))


@pytest.mark.parametrize('name', ['downloads', 'splits', 'num_samples'])
def test_words_in_the_name_of_a_folder_do_not_mislead_the_error(tmp_path, name):
    (tmp_path / name).mkdir()
    with refused(f'data_dir={tmp_path / name}', '0 images'):
        open_dataset('', str(tmp_path / name), 'train')


def test_parameters_that_do_not_apply_are_refused(tmp_path):
    root = str(write_classes(tmp_path / 'images', 2))
    with refused('target_key', root):
        open_dataset('', root, target_key='label')
    with refused('class_map', 'missing.txt'):
        open_dataset('', root, class_map='missing.txt')
    with refused('in_chans=0'):
        image_mode(0)
    with refused('in_chans=4', 'torch/mnist'):
        open_dataset('torch/mnist', root, in_chans=4)
    for option in (dict(class_map='map.txt'), dict(num_samples=4)):
        with refused(next(iter(option)), 'digits'):
            open_dataset('digits', None, **option)
    with refused('num_samples=4', 'folder'):
        open_dataset('', root, num_samples=4)


@pytest.mark.parametrize('error', [AttributeError, TypeError])
def test_a_bug_on_the_way_keeps_its_type(tmp_path, monkeypatch, error):
    def buggy(*args, **kwargs):
        raise error('a bug')

    monkeypatch.setattr('timm_cgh.data.sources.FileReader', buggy)
    with pytest.raises(error, match='a bug'):
        open_dataset('', str(write_classes(tmp_path / 'images', 2)), input_key='.png')


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'I;16', 'I', 'F'])
@pytest.mark.parametrize('wanted', ['L', 'RGB'])
def test_images_of_every_mode_convert(mode, wanted):
    gray = picture(0, mode='L')
    if mode in ('I;16', 'I', 'F'):
        unit = {'I;16': np.uint16(257), 'I': np.int32(257), 'F': np.float32(1 / 255)}[mode]
        image = Image.fromarray(np.asarray(gray).astype(unit.dtype) * unit)  # Pillow's own conversion does not scale
    else:
        image = picture(0).convert(mode) if mode != '1' else gray.convert('1')
    assert image.mode == mode
    converted = decode_image(image, Decoding(wanted))
    assert converted.mode == wanted
    if mode in ('L', 'I;16', 'I', 'F'):
        expected = gray if mode != 'L' else image
        np.testing.assert_array_equal(np.asarray(converted), np.asarray(expected.convert(wanted)))


def test_transparent_palette_converts_without_a_warning(recwarn):
    image = picture(0).convert('P')
    image.info['transparency'] = bytes(range(256))
    assert decode_image(image).mode == 'RGB' and not recwarn.list


@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_truncated_files_are_replaced_and_named(tmp_path, suffix):
    for i in range(3):
        picture(i, size=64).save(tmp_path / f'{i}{suffix}')
    whole = (tmp_path / f'1{suffix}').read_bytes()
    dataset = open_dataset('', str(tmp_path), 'train')
    for length in (0, 3, 40, len(whole) // 2):
        (tmp_path / f'1{suffix}').write_bytes(whole[:length])
        image, _, unreadable = read_or_substitute(dataset, 1)
        (named,) = unreadable
        assert re.match(re.escape(str(tmp_path / f'1{suffix}')) + r' \(.*(Pillow knows|[Tt]runcated).*\)$', named)
        others = [np.asarray(read_image(dataset, i, 'RGB')[0]) for i in (0, 2)]
        assert any(np.array_equal(np.asarray(image), other) for other in others)


def test_scrambled_files_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(2):
        picture(i, size=32).save(tmp_path / f'{i}.png')
    dataset, whole = open_dataset('', str(tmp_path), 'train'), (tmp_path / '0.png').read_bytes()
    for _ in range(60):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), 8):
            broken[place] = rng.integers(256)
        (tmp_path / '0.png').write_bytes(broken)
        assert read_or_substitute(dataset, 0)[0].size is not None


def test_images_that_are_all_broken_are_an_error(tmp_path):
    for i in range(12):
        (tmp_path / f'{i}.jpg').write_bytes(b'not an image')
    with refused('data_dir', '0.jpg'):
        read_or_substitute(open_dataset('', str(tmp_path)), 0)


def test_a_run_of_unreadable_neighbours_is_replaced(tmp_path):
    """An interrupted copy, the second files of a Mac: half of the images, the first ones in name order."""
    for i in range(60):
        path = tmp_path / f'{i:03}.png'
        path.write_bytes(b'') if i < 30 else picture(i).save(path)
    dataset = open_dataset('', str(tmp_path), 'train')
    taken = [read_or_substitute(dataset, i) for i in range(60)]
    for i, (_, _, names) in enumerate(taken):
        assert [name.partition(' (')[0] for name in names[:1]] == ([str(tmp_path / f'{i:03}.png')] if i < 30 else [])
    assert all(len(names) == len(set(names)) < 10 for _, _, names in taken)
    again = read_or_substitute(dataset, 7)
    assert again[2] == taken[7][2] and np.array_equal(np.asarray(again[0]), np.asarray(taken[7][0]))


@pytest.mark.parametrize('rank,local_rank,turn', [(0, 0, 0), (1, 1, 2), (8, 0, 1), (9, 1, 2)])
def test_rank_zero_downloads_first_then_one_process_of_each_node(rank, local_rank, turn, monkeypatch, tmp_path):
    happened = []
    monkeypatch.setenv('LOCAL_RANK', str(local_rank))
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_rank', lambda: rank)
    monkeypatch.setattr(dist, 'barrier', lambda: happened.append('barrier'))
    monkeypatch.setattr('timm_cgh.data.sources.create_dataset', lambda *_, **__: happened.append('opened') or Opened())
    open_dataset('torch/cifar10', str(tmp_path), dataset_download=True)
    assert happened == ['barrier'] * turn + ['opened'] + ['barrier'] * (2 - turn)
    happened.clear()
    open_dataset('torch/cifar10', str(tmp_path))
    assert happened == ['opened']


@pytest.mark.parametrize('tar', [False, True])
def test_images_of_other_formats_are_found_and_timms_list_is_restored(tar, tmp_path):
    before = timm.data.get_img_extensions()
    for number, ending in enumerate(('jpg', 'png', 'webp', 'bmp', 'tif', 'TIFF')):
        (tmp_path / 'images' / 'cat').mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / 'images' / 'cat' / f'{number}.{ending}')
    (tmp_path / 'images' / 'cat' / 'notes.txt').write_text('no image')
    root = write_tar(tmp_path / 'images.tar', tmp_path / 'images') if tar else tmp_path / 'images'
    dataset = open_dataset('', str(root))
    assert len(dataset) == 6 and all(read_image(dataset, i, 'RGB')[0].size == (16, 16) for i in range(6))
    assert timm.data.get_img_extensions() == before


def test_a_tar_of_any_size_is_read_as_it_is(tmp_path, monkeypatch):
    """timm trusts an index that it wrote beside a tar above 10 GB, also when the tar is another one by then."""
    monkeypatch.setattr(os.path, 'getsize', lambda _: 20 * 1024 ** 3)
    for count in (4, 6):
        folder = write_classes(tmp_path / f'{count}', count // 2)
        assert len(open_dataset('', str(write_tar(tmp_path / 'images.tar', folder)))) == count
    assert sorted(path.name for path in tmp_path.iterdir()) == ['4', '6', 'images.tar']


def test_a_class_map_that_lacks_a_class_of_a_parquet_is_refused(tmp_path):
    folder = write_parquet(tmp_path / 'set', PICTURES, labels=[0, 1, 2], classes=['ant', 'bee', 'cat'])
    source = f'hfds/{folder}', str(tmp_path / 'cache')
    with refused('class_map', 'bee'):
        open_dataset(*source, class_map={'ant': 0, 'cat': 1})
    dataset = open_dataset(*source, class_map={'ant': 0, 'bee': 1, 'cat': 1})
    assert [read_image(dataset, i, 'RGB')[1] for i in range(3)] == [0, 1, 1]


def test_fingerprint_tells_the_images_and_not_where_they_lie(tmp_path):
    write_classes(tmp_path / 'here', 2)
    shutil.copytree(tmp_path / 'here', tmp_path / 'there')
    here, there = (fingerprint(open_dataset('', str(tmp_path / name))) for name in ('here', 'there'))
    assert here == there
    shutil.copy(tmp_path / 'there' / 'cat' / '000.png', tmp_path / 'there' / 'cat' / '900.png')
    assert fingerprint(open_dataset('', str(tmp_path / 'there'))) != here
