"""Labelled data of the evaluations, and features of it."""
import os
import shutil

import pytest
import timm
import torch
import torch.nn as nn
from torch.utils.data import Subset

from data_files import write_classes, write_images
from input_errors import refused
from timm_cgh.data import Digits, read_labels
from timm_cgh.distributed import block_indices
from timm_cgh.eval import FeatureExtractor, Pixels, create_eval_loader, extract_features
from timm_cgh.eval.datasets import class_names, open_labelled, open_labelled_datasets
from timm_cgh.train.monitor import KnnMonitor

CONFIG = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear')


def write_splits(folder, train=('cat', 'dog'), val=('cat', 'dog')):
    write_classes(folder / 'train', 3, train)
    write_classes(folder / 'val', 2, val, first=100)
    return str(folder)


def open_folder(folder, **kwargs):
    return open_labelled_datasets(CONFIG, data_dir=str(folder), **kwargs)


# ---- data sets

def test_folder_of_splits_opens(tmp_path):
    data = open_folder(write_splits(tmp_path))
    assert (len(data.train), len(data.val), data.num_classes, data.class_names) == (6, 4, 2, ['cat', 'dog'])


def test_class_names_are_known_for_all_classes_or_none():
    assert class_names(Digits('train', 'L'), 10) == [str(i) for i in range(10)]
    assert class_names(Digits('train', 'L'), 9) is None


@pytest.mark.parametrize('train, val, parameter, part', [
    (('cat', 'dog'), ('cat', 'cow'), 'val_split', '1 classes without training images (cow)'),
    (('cat',), ('cat',), 'data_dir', 'all of one class'),
])
def test_classes_that_do_not_match_are_refused(train, val, parameter, part, tmp_path):
    with refused(parameter, part):
        open_folder(write_splits(tmp_path, train, val))


def test_images_without_class_folders_are_refused(tmp_path):
    write_images(tmp_path / 'train', 3)
    write_images(tmp_path / 'val', 3)
    with refused('train_split=train', 'class folders'):
        open_folder(tmp_path)


def test_a_class_without_validation_images_keeps_its_number(tmp_path):
    write_splits(tmp_path, ('ant', 'bee', 'cat', 'dog'), ('bee', 'dog'))
    (tmp_path / 'val' / 'cat').mkdir()
    (tmp_path / 'train' / 'empty').mkdir()
    write_images(tmp_path / 'val', 2, first=50)  # loose ones are of no class
    data = open_folder(tmp_path)
    assert read_labels(data.val).tolist() == [1, 1, 3, 3]
    assert (data.num_classes, data.class_names) == (4, ['ant', 'bee', 'cat', 'dog'])


def test_images_of_classes_that_a_map_leaves_out_are_left_out(tmp_path):
    (tmp_path / 'classes.txt').write_text('cat\nbee\n')
    data = open_folder(write_splits(tmp_path, ('bee', 'cat', 'dog'), ('bee', 'dog')),
                       class_map=str(tmp_path / 'classes.txt'))
    assert read_labels(data.train).tolist() == [1] * 3 + [0] * 3 and read_labels(data.val).tolist() == [1, 1]


def test_validation_images_without_class_folders_are_refused(tmp_path):
    write_classes(tmp_path / 'train', 3)
    write_images(tmp_path / 'val', 3)
    with refused('data_dir', 'val', '0 images'):
        open_folder(tmp_path)


@pytest.mark.parametrize('splits, parameter, part', [
    (dict(val_split='train'), 'val_split', 'shares images with the training split'),
    (dict(train_split='val'), 'val_split=validation', 'shares images with the training split'),
    (dict(val_split='test'), 'val_split', 'test'),
    (dict(train_split='training2'), 'train_split', 'training2'),
])
def test_splits_that_do_not_exist_are_refused(splits, parameter, part, tmp_path):
    with refused(parameter, part):
        open_folder(write_splits(tmp_path), **splits)


def test_a_folder_without_splits_is_not_its_own_validation_split(tmp_path):
    with refused('val_split=training', 'shares images with the training split'):
        open_folder(write_classes(tmp_path, 5), val_split='training')


@pytest.mark.parametrize('source', [dict(dataset='digits', train_split='validation'), dict(train_split='val')])
def test_a_fifth_is_held_out_where_the_validation_images_are_trained_on(source, tmp_path):
    write_splits(tmp_path)
    data = open_folder(tmp_path, val_split=None, **source)
    assert data.val_split == 'a fifth of the training images' and not {*data.train.indices} & {*data.val.indices}


def test_validation_images_are_not_taken_for_training_images(tmp_path):
    write_classes(tmp_path / 'val', 2)
    with refused('train_split', 'train: no such folder'):
        open_labelled('', str(tmp_path), 'train')


def test_unlabelled_images_are_skipped_or_refused(monkeypatch):
    digits = Digits('train', 'L')
    digits.targets = [target if i % 2 else -1 for i, target in enumerate(digits.targets)]
    monkeypatch.setattr('timm_cgh.eval.datasets.open_dataset', lambda *args, **kwargs: digits)
    labelled = open_labelled('digits', None, 'train', in_chans=1)
    assert len(labelled) == len(digits) // 2 and labelled[0][1] == digits.targets[1]
    digits.targets = [-1] * len(digits)
    with refused('train_split', 'has no labels'):
        open_labelled('digits', None, 'train', in_chans=1)


# ---- features over processes

@pytest.mark.parametrize('count, size, world_size', [(103, 8, 1), (103, 8, 2), (103, 8, 3), (5, 8, 3), (16, 8, 2)])
def test_every_image_belongs_to_one_rank(count, size, world_size):
    shares = [block_indices(count, size, rank, world_size) for rank in range(world_size)]
    assert sorted(torch.cat(shares).tolist()) == list(range(count))


@pytest.fixture
def damaged(tmp_path):
    """Folder of splits with an unreadable image among the six of `train`, one cut short among the four of `val`."""
    write_splits(tmp_path)
    (tmp_path / 'train' / 'cat' / '001.png').write_bytes(b'no image')
    path = tmp_path / 'val' / 'dog' / '103.png'
    path.write_bytes(path.read_bytes()[:-100])
    return tmp_path


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('batch_size', [1, 2, 100])  # 1: a batch without images
def test_an_unreadable_image_is_left_out_and_named(damaged, caplog, batch_size, workers):
    extractor = FeatureExtractor(CONFIG, batch_size=batch_size, workers=workers)
    images = open_labelled('', str(damaged), 'train')
    features, labels, indices = extractor(timm.create_model('test_resnet', num_classes=0).eval(), images)
    assert len(features) == 5 and labels.tolist() == [0, 0, 1, 1, 1] and indices.tolist() == [0, 2, 3, 4, 5]
    assert caplog.text.count('Unreadable image left out: ') == 1
    assert '001.png (not an image that Pillow knows' in caplog.text
    alone = extractor(timm.create_model('test_resnet', num_classes=0).eval(), Subset(images, [2]))
    assert alone.labels.tolist() == [0] and alone.indices.tolist() == [0]


def test_features_stay_beside_the_images_that_they_are_of(damaged):
    pixels = Pixels(CONFIG['mean'], CONFIG['std'])
    images = open_labelled('', str(damaged), 'train')
    left_out = FeatureExtractor(CONFIG, batch_size=4)(pixels, images)
    for feature, index in zip(left_out.features, left_out.indices):
        alone, _, _ = FeatureExtractor(CONFIG)(pixels, Subset(images, [int(index)]))
        assert torch.equal(feature, alone[0])


def test_the_knn_check_of_training_leaves_unreadable_images_out(damaged, caplog):
    # each validation image is a training image as well: all are right, unless another stands in for one
    shutil.rmtree(damaged / 'val')
    shutil.copytree(damaged / 'train', damaged / 'val')
    sets = [open_labelled('', str(damaged), split) for split in ('train', 'validation')]
    seen = []
    monitor = KnnMonitor(*sets, FeatureExtractor(CONFIG))
    extract = monitor._extract
    monitor._extract = lambda *args: seen.append(extract(*args)) or seen[-1]
    monitor.pixels()
    monitor.pixels()
    assert [len(labels) for _, labels in seen] == 2 * [5, 5]
    assert caplog.text.count('Unreadable image left out: ') == 2  # one on either side, once


def test_data_without_a_readable_image_is_refused(damaged, caplog):
    for path in damaged.glob('train/*/*.png'):
        path.write_bytes(b'no image')
    with refused('data_dir', 'none of 6 images can be read', '000.png'):
        FeatureExtractor(CONFIG)(Pixels(CONFIG['mean'], CONFIG['std']), open_labelled('', str(damaged), 'train'))


def test_many_unreadable_images_are_named_in_part_and_counted(tmp_path, caplog):
    write_splits(tmp_path)
    for path in write_classes(tmp_path / 'train', 30, first=200).glob('*/*.png'):
        if int(path.stem) > 200:
            path.write_bytes(b'no image')
    FeatureExtractor(CONFIG).find_readable(open_labelled('', str(tmp_path), 'train'))
    assert caplog.text.count('Unreadable image') == 20 and '39 more images' in caplog.text


def test_features_hold_no_file_descriptor_for_each_batch(tmp_path):
    def counted(loader):
        for batch in loader:
            yield batch
            descriptors.append(len(os.listdir('/proc/self/fd')))

    images = open_labelled('', write_splits(tmp_path), 'train')
    descriptors = []
    loader = create_eval_loader(Subset(images, [0] * 100), CONFIG, batch_size=1, workers=1)
    extract_features(nn.Flatten(), counted(loader))
    assert max(descriptors) - descriptors[0] < 20
