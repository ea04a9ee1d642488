"""kNN compares labelled images only, and never an image with itself."""
import numpy as np
import pytest
from data_files import write_classes, write_images, write_shards, write_tar
from torch.utils.data import Subset
from torchvision.datasets import INaturalist

from timm_cgh.data import ImageSubset, labels_of, open_dataset, open_eval_datasets
from timm_cgh.data.sources import InputError


def open_sets(root, val=None, name='', train='train', max_images=1000, seed=0, **kwargs):
    return open_eval_datasets(name, root and str(root), train, val, max_images=max_images, seed=seed, **kwargs)


def pixels(dataset):
    return {np.asarray(image).tobytes() for image, _ in dataset}


def test_labels_of_folder_tar_and_subset_are_those_of_the_items(tmp_path):
    folder = write_classes(tmp_path / 'images', 3)
    tar = write_tar(tmp_path / 'images.tar', folder)
    for root in (folder, tar):
        dataset = open_dataset('', str(root), 'train')
        assert labels_of(dataset).tolist() == [dataset[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
        assert labels_of(Subset(dataset, [5, 0])).tolist() == [1, 0]
    assert labels_of(open_dataset('digits', None)).tolist() == open_dataset('digits', None).targets


def test_labels_of_parquet_are_those_of_the_items(shared_data, tmp_path):
    dataset = open_dataset(f"hfds/{shared_data / 'cifar10'}", str(tmp_path), 'test[5:25]')
    assert labels_of(dataset).tolist() == list(dataset.reader.iter_targets())


def test_labelled_split_is_found(tmp_path):
    write_classes(tmp_path / 'train', 4)
    write_classes(tmp_path / 'val', 2, first=50)
    (reference, query), text = open_sets(tmp_path)
    assert (len(reference), len(query)) == (8, 4) and 'val' in text
    assert not pixels(reference) & pixels(query)


def test_without_a_split_a_fixed_fifth_is_held_out(tmp_path):
    write_classes(tmp_path, 20)
    (reference, query), text = open_sets(tmp_path)
    assert (len(reference), len(query)) == (32, 8) and 'held' not in text and 'training images' in text
    assert not set(reference.indices) & set(query.indices)
    assert open_sets(tmp_path)[0][1].indices == query.indices
    assert open_sets(tmp_path, seed=1)[0][1].indices != query.indices


def test_a_folder_inside_the_training_images_is_no_split_of_its_own(tmp_path):
    write_classes(tmp_path, 10, classes=('cat', 'dog', 'val'))
    (reference, query), text = open_sets(tmp_path)  # no folder train: all of it is trained on, val too
    assert reference.dataset is query.dataset and 'others' in text
    with pytest.raises(InputError, match='--val-split val: lies among the training images'):
        open_sets(tmp_path, 'val')


def test_classes_keep_their_numbers_where_a_split_lacks_some(tmp_path):
    write_classes(tmp_path / 'train', 3, classes=('ant', 'bee', 'cat'))
    write_classes(tmp_path / 'test', 2, classes=('bee', 'cat', 'eel'), first=50)
    (reference, query), _ = open_sets(tmp_path)
    assert sorted(label for _, label in query) == [1, 1, 2, 2]


def test_both_sides_are_capped_by_a_seeded_choice(tmp_path):
    write_classes(tmp_path / 'train', 10)
    write_classes(tmp_path / 'validation', 10)
    sets, _ = open_sets(tmp_path, max_images=5)
    assert [len(s) for s in sets] == [5, 5] and sets[0].indices == sorted(sets[0].indices)
    assert open_sets(tmp_path, max_images=5)[0][0].indices == sets[0].indices
    assert open_sets(tmp_path, max_images=5, seed=3)[0][0].indices != sets[0].indices


def test_digits_use_their_validation_split():
    (reference, query), text = open_sets(None, name='digits', in_chans=1)
    assert len(reference) == 1000 and len(query) == len(open_dataset('digits', None, 'validation'))
    assert query[0][0].mode == 'L' and 'validation' in text


def test_unlabelled_images_are_left_out():
    train = open_dataset('digits', None)
    train.targets = [-1 if i % 2 else label for i, label in enumerate(train.targets)]
    (reference, _), _ = open_eval_datasets('digits', None, 'train', None, max_images=None, seed=0, train=train)
    assert len(reference) == -(-len(train) // 2) and min(label for _, label in reference) >= 0


@pytest.mark.parametrize('layout,why', [('flat', 'one class'), ('alone', 'share')])
def test_without_labels_there_is_nothing_to_compare(tmp_path, layout, why):
    if layout == 'flat':
        write_images(tmp_path, 6)
    else:
        write_classes(tmp_path, 1, classes=[f'c{i}' for i in range(6)])
    sets, text = open_sets(tmp_path)
    assert sets is None and why in text


@pytest.mark.parametrize('val,named', [('missing', '--val-split missing'), ('train', '--val-split train'), ('flat', 'flat')])
def test_a_named_split_that_cannot_serve_is_refused(tmp_path, val, named):
    write_classes(tmp_path / 'train', 3)
    write_images(tmp_path / 'flat', 3)
    with pytest.raises(InputError, match=named):
        open_sets(tmp_path, val)


def test_parquet_slice_is_compared_with_the_test_split(shared_data, tmp_path):
    name = f"hfds/{shared_data / 'cifar10'}"
    (reference, query), text = open_sets(tmp_path, name=name, train='train[:200]', max_images=50)
    assert len(reference.dataset) == 200 and len(reference) == len(query) == 50 and '50 images of test' in text
    (reference, query), text = open_sets(tmp_path, name=name, train='test[900:1100]', max_images=50)
    assert query.dataset is reference.dataset  # the rest of test is no split of its own, train no test


def test_streams_are_compared_only_where_a_split_is_named(tmp_path):
    write_shards(tmp_path, name='train')
    write_shards(tmp_path, name='val', shards=1)
    train = 'train-{000000..000001}.tar|24'
    assert open_sets(tmp_path, name='wds/', train=train)[0] is None
    (reference, query), _ = open_sets(tmp_path, 'val-{000000..000000}.tar', name='wds/', train=train, max_images=20)
    assert len(list(reference)) == 20 and [label for _, label in query] == [i % 3 for i in range(12)]


def test_subset_replaces_an_unreadable_image_within_itself(tmp_path):
    write_images(tmp_path, 4)
    (tmp_path / '001.png').write_bytes(b'broken')
    dataset = open_dataset('', str(tmp_path))
    subset = ImageSubset(dataset, [1, 3], 'L')
    assert subset[0][0].tobytes() == subset.__getitems__([0, 1])[1][0].tobytes() and subset[0][0].mode == 'L'


@pytest.mark.parametrize('val', [None, 'val'])
def test_classes_that_torchvision_numbers_otherwise_are_never_compared(val, tmp_path):
    write_classes(tmp_path / 'train', 6, classes=('ant', 'bee', 'cat'))
    write_classes(tmp_path / 'val', 3, classes=('ant', 'cat'), first=50)  # its ImageFolder has 1 for cat, not 2
    if val:
        with pytest.raises(InputError, match='--val-split val: cat is another number'):
            open_sets(tmp_path, val, name='torch/image_folder')
    else:
        assert 'others' in open_sets(tmp_path, name='torch/image_folder')[1]


def test_labels_of_inaturalist_are_those_of_the_items(tmp_path):
    for place, name in enumerate(('00000_Animalia_A_B_C_D_E_f', '00001_Animalia_A_B_C_D_E_g')):
        write_images(tmp_path / '2021_train_mini' / name, 2, first=2 * place)
    dataset = INaturalist(str(tmp_path), version='2021_train_mini')
    assert labels_of(dataset).tolist() == [dataset[i][1] for i in range(4)] == [0, 0, 1, 1]
