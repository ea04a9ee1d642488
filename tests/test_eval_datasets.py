"""Labelled data of the evaluations, and features of it."""
import pytest
import timm
import torch

from data_files import write_classes, write_images
from input_errors import refused
from timm_cgh.data import Digits
from timm_cgh.eval import FeatureExtractor
from timm_cgh.eval.datasets import class_names, open_labelled, open_labelled_datasets
from timm_cgh.eval.gather import block_indices

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
    (('ant', 'cat', 'dog'), ('cat', 'dog'), 'val_split', 'class cat has another number than in training'),
    (('cat',), ('cat',), 'data_dir', 'all of one class'),
])
def test_classes_that_do_not_match_are_refused(train, val, parameter, part, tmp_path):
    with refused(parameter, part):
        open_folder(write_splits(tmp_path, train, val))


def test_images_without_class_folders_are_refused(tmp_path):
    write_images(tmp_path / 'train', 3)
    write_images(tmp_path / 'val', 3)
    with refused('data_dir', 'one class'):
        open_folder(tmp_path)


@pytest.mark.parametrize('splits, parameter, part', [
    (dict(val_split='train'), 'val_split', 'is the training split'),
    (dict(val_split='test'), 'val_split', 'test'),
    (dict(train_split='training2'), 'train_split', 'training2'),
])
def test_splits_that_do_not_exist_are_refused(splits, parameter, part, tmp_path):
    with refused(parameter, part):
        open_folder(write_splits(tmp_path), **splits)


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


def test_an_unreadable_image_is_replaced_and_named(tmp_path, caplog):
    data_dir = write_splits(tmp_path)
    (tmp_path / 'train' / 'cat' / '001.png').write_bytes(b'no image')
    extractor = FeatureExtractor(CONFIG, batch_size=2)
    model = timm.create_model('test_resnet', num_classes=0)
    features, labels = extractor(model, open_labelled('', data_dir, 'train'))
    assert torch.equal(features[1], features[4]) and labels.tolist() == [0, 1, 0, 1, 1, 1]
    assert '001.png' in caplog.text
