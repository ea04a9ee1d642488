"""kNN compares labelled images only, and never an image with itself."""
from types import SimpleNamespace

import numpy as np
import pytest

from data_files import write_classes, write_images, write_shards
from input_errors import refused
from timm_cgh.data import open_dataset, open_knn_datasets
from timm_cgh.data.sources import splits_overlap


def open_sets(root, val=None, dataset='', train_split='train', max_images=1000, seed=0, **source):
    return open_knn_datasets(
        dataset, root and str(root), train_split, val, max_images=max_images, seed=seed, **source)


def pixels(dataset):
    return {np.asarray(image).tobytes() for image, _ in dataset}


def test_labelled_split_is_found(tmp_path):
    write_classes(tmp_path / 'train', 4)
    write_classes(tmp_path / 'val', 2, first=50)
    (reference, query), text = open_sets(tmp_path)
    assert (len(reference), len(query)) == (8, 4) and text.endswith('of train; 2 classes: cat, dog')
    assert not pixels(reference) & pixels(query)


def test_without_a_split_a_fixed_fifth_is_compared_with_the_rest(tmp_path):
    write_classes(tmp_path, 20)
    (reference, query), text = open_sets(tmp_path)
    assert (len(reference), len(query)) == (32, 8) and 'held' not in text and 'training images' in text
    assert not set(reference.indices) & set(query.indices)
    assert open_sets(tmp_path)[0][1].indices == query.indices
    assert open_sets(tmp_path, seed=1)[0][1].indices != query.indices


def test_a_folder_among_the_training_images_is_not_a_validation_split(tmp_path):
    write_classes(tmp_path, 10, classes=('cat', 'dog', 'val'))
    (reference, query), text = open_sets(tmp_path)  # no folder train: all of it is trained on, val too
    assert reference.dataset is query.dataset and 'others' in text
    with refused('val_split=val', 'shares images with the training split'):
        open_sets(tmp_path, 'val')


def test_classes_keep_their_numbers_where_a_split_lacks_some(tmp_path):
    write_classes(tmp_path / 'train', 3, classes=('ant', 'bee', 'cat'))
    write_classes(tmp_path / 'test', 2, classes=('bee', 'cat', 'eel'), first=50)
    (_, query), _ = open_sets(tmp_path)
    assert sorted(label for _, label in query) == [1, 1, 2, 2]


def test_both_sides_are_capped_by_a_seeded_choice(tmp_path):
    write_classes(tmp_path / 'train', 10)
    write_classes(tmp_path / 'validation', 10)
    sets, _ = open_sets(tmp_path, max_images=5)
    assert [len(s) for s in sets] == [5, 5] and sets[0].indices == sorted(sets[0].indices)
    assert open_sets(tmp_path, max_images=5)[0][0].indices == sets[0].indices
    assert open_sets(tmp_path, max_images=5, seed=3)[0][0].indices != sets[0].indices


def test_digits_use_their_validation_split():
    (reference, query), text = open_sets(None, dataset='digits', in_chans=1)
    assert len(reference) == 1000 and len(query) == len(open_dataset('digits', None, 'validation'))
    assert query[0][0].mode == 'L' and 'validation' in text


def test_unlabelled_images_are_left_out():
    train = open_dataset('digits', None)
    train.targets = [-1 if i % 2 else label for i, label in enumerate(train.targets)]
    (reference, _), _ = open_knn_datasets('digits', None, 'train', None, max_images=None, seed=0, train=train)
    assert len(reference) == -(-len(train) // 2) and min(label for _, label in reference) >= 0


@pytest.mark.parametrize('layout, why', [('flat', 'fewer than two classes'), ('alone', 'hardly share a class')])
def test_without_labels_nothing_is_compared(tmp_path, layout, why):
    if layout == 'flat':
        write_images(tmp_path, 6)
    else:
        write_classes(tmp_path, 1, classes=[f'c{i}' for i in range(6)])
    sets, text = open_sets(tmp_path)
    assert sets is None and why in text


@pytest.mark.parametrize('val, at_fault, why', [
    ('missing', 'val_split=missing', 'not in'),
    ('train', 'val_split=train', 'shares images with the training split'),
    ('birds', 'data_dir', '0 images'),  # of the classes in train
])
def test_a_named_split_that_cannot_be_compared_is_refused(tmp_path, val, at_fault, why):
    write_classes(tmp_path / 'train', 3)
    write_classes(tmp_path / 'birds', 3, classes=('emu', 'owl'))
    with refused(at_fault, val, why):
        open_sets(tmp_path, val)


@pytest.mark.parametrize('dataset, train, val, overlap', [
    ('', 'val', 'validation', True), ('', 'Val', 'evaluation', True), ('', 'val', 'test', False),
    ('', 'train', 'training', True), ('', 'train', 'val', True),  # without a folder train all images are for training
    ('torch/image_folder', 'val', 'valid', True),
    ('torch/cifar10', 'train', 'training', True), ('torch/cifar10', 'test', 'val', True),
    ('torch/cifar10', 'train', 'test', False), ('torch/imagenet', 'val', 'validation', True),
    ('torch/stl10', 'train', 'test', False), ('torch/stl10', 'test', 'val', True),
    ('hfds/table', 'train', 'train[:10%]', True), ('hfds/table', 'train[:50%]', 'train[50%:]', False),
    ('hfds/table', 'train[:60%]', 'train[50%:]', True), ('hfds/table', 'train+test', 'test[:10]', True),
    ('hfds/table', 'all', 'test', True), ('hfds/table', 'train', 'test', False), ('hfds/table', 'train', '[', False),
    ('hfds/table', '[', '[', True), ('digits', 'train', 'validation', False), ('wds/', 'train', 'training', False),
])
def test_splits_overlap_by_whatever_names(tmp_path, dataset, train, val, overlap):
    for name in ('val', 'test'):
        (tmp_path / name).mkdir()
    rows = SimpleNamespace(info=SimpleNamespace(splits={
        'train': SimpleNamespace(num_examples=101), 'test': SimpleNamespace(num_examples=50)}))
    images = SimpleNamespace(reader=SimpleNamespace(dataset=rows))
    if dataset.startswith('hfds'):
        pytest.importorskip('datasets')
    assert splits_overlap(images, train, val, dataset, str(tmp_path)) == overlap


def test_a_named_split_for_images_without_labels_is_refused(tmp_path):
    write_images(tmp_path / 'train', 4)
    write_classes(tmp_path / 'val', 2)
    assert open_sets(tmp_path)[0] is None
    with refused('val_split=val', 'fewer than two classes'):
        open_sets(tmp_path, 'val')


def test_parquet_slice_is_compared_with_the_test_split(shared_data, tmp_path):
    source = dict(dataset=f"hfds/{shared_data / 'cifar10'}", max_images=50)
    (reference, query), text = open_sets(tmp_path, train_split='train[:200]', **source)
    assert len(reference.dataset) == 200 and len(reference) == len(query) == 50 and '50 images of test' in text
    (reference, query), _ = open_sets(tmp_path, train_split='test[900:1100]', **source)
    assert query.dataset is reference.dataset  # test is trained on in part, and train is not a name for validation


@pytest.mark.parametrize('processes', [1, 2])
def test_streams_are_compared_only_where_a_split_is_named(tmp_path, monkeypatch, processes):
    monkeypatch.setattr('torch.distributed.is_initialized', lambda: processes > 1)
    monkeypatch.setattr('torch.distributed.get_world_size', lambda: processes)
    monkeypatch.setattr('torch.distributed.get_rank', lambda: 0)
    source = dict(dataset='wds/', train_split=write_shards(tmp_path, 12, name='train'))
    val, _, _ = write_shards(tmp_path, 12, shards=1, name='val').partition('|')
    assert open_sets(tmp_path, **source)[0] is None
    (reference, query), _ = open_sets(tmp_path, val, max_images=20, **source)
    assert len(list(reference)) == 20 and [label for _, label in query] == [i % 3 for i in range(12)]


@pytest.mark.parametrize('val', [None, 'val'])
def test_classes_that_torchvision_numbers_differently_are_never_compared(val, tmp_path):
    write_classes(tmp_path / 'train', 6, classes=('ant', 'bee', 'cat'))
    write_classes(tmp_path / 'val', 3, classes=('ant', 'cat'), first=50)  # its ImageFolder has 1 for cat, not 2
    if val:
        with refused('val_split', 'class cat has another number'):
            open_sets(tmp_path, val, dataset='torch/image_folder')
    else:
        assert 'others' in open_sets(tmp_path, dataset='torch/image_folder')[1]
