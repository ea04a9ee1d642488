"""Which files of a folder or a tar are images, and of which class."""
import logging
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_files import encode, picture, write_classes, write_images, write_tar
from timm_cgh.data import class_to_idx, open_dataset, read_labels
from timm_cgh.data.decode import image_name, read_image


def open_either(root, tar, tmp_path, **options):
    """A folder, or a tar of it."""
    return open_dataset('', str(write_tar(tmp_path / 'images.tar', root) if tar else root), **options)


@pytest.mark.parametrize('tar', [False, True])
def test_hidden_and_system_files_are_neither_images_nor_classes(tar, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = write_classes(tmp_path / 'images', 4)
    for extra in ('cat/.ipynb_checkpoints', 'cat/.thumbnails', '@eaDir/cat', '__MACOSX/dog', 'Lost+Found'):
        write_images(root / extra, 2)
    (root / 'dog' / '._000.png').write_bytes(b'\0\5\x16\7')
    (root / 'dog' / '.DS_Store').write_bytes(b'Bud1')
    dataset = open_either(root, tar, tmp_path)
    assert len(dataset) == 8 and class_to_idx(dataset) == {'cat': 0, 'dog': 1} and 'hidden' in caplog.text


def test_a_hidden_root_is_read(tmp_path):
    assert len(open_dataset('', str(write_classes(tmp_path / '.cache' / 'images', 2)))) == 4


def test_each_folder_is_visited_once(tmp_path):
    root = write_classes(tmp_path / 'images', 4)
    os.symlink('..', root / 'cat' / 'up')
    os.symlink(root / 'cat', root / 'a link that sorts first')
    assert len(open_dataset('', str(root))) == 8
    os.symlink(write_images(tmp_path / 'elsewhere', 3), root / 'bird')
    assert sorted(class_to_idx(open_dataset('', str(root)))) == ['bird', 'cat', 'dog']


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, caplog):
    scan = os.scandir

    def guarded(path):
        if str(path).endswith('cat'):
            raise PermissionError(13, 'Permission denied', path)
        return scan(path)

    monkeypatch.setattr(os, 'scandir', guarded)
    assert len(open_dataset('', str(write_classes(tmp_path / 'images', 4)))) == 4
    assert 'Folder skipped' in caplog.text and 'images/cat' in caplog.text


@pytest.mark.parametrize('tar', [False, True])
def test_images_of_all_formats_are_found_and_the_rest_is_counted_by_ending(tar, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = tmp_path / 'images'
    (root / 'cat').mkdir(parents=True)
    formats = {'jfif': 'JPEG', 'jpe': 'JPEG', 'JPEG': 'JPEG', 'TIFF': 'TIFF', 'jp2': 'JPEG2000', 'ppm': 'PPM'}
    for number, ending in enumerate((*formats, 'jpg', 'png', 'webp', 'bmp', 'tif', 'gif')):
        picture(number).save(root / 'cat' / f'{number}.{ending}', formats.get(ending))
    for name in ('notes.txt', 'more.txt', 'film.mp4', 'bare', 'font.pdf'):
        (root / 'cat' / name).write_text('no image')
    np.save(root / 'cat' / 'table.npy', np.zeros((4, 4)))
    dataset = open_either(root, tar, tmp_path)
    assert len(dataset) == 12 and all(read_image(dataset, i)[0].size == (16, 16) for i in range(12))
    for part in ('12 images; ignored: 2 .txt', '1 .mp4', '1 without ending', '1 .pdf', '1 .npy'):
        assert part in caplog.text


@pytest.mark.parametrize('layout', [('Train', 'Test'), ('images/train', 'images/test'), ('train.tar', 'TEST.tar')])
def test_splits_are_found_whatever_their_case_and_below_images(layout, tmp_path):
    for name, count in zip(layout, (6, 2)):
        folder = write_classes(tmp_path / name.removesuffix('.tar'), count)
        if name.endswith('.tar'):
            write_tar(tmp_path / name, folder)
            folder.rename(tmp_path.parent / f'{tmp_path.name}-{name}')
    assert len(open_dataset('', str(tmp_path))) == 12
    assert len(open_dataset('', str(tmp_path), 'test')) == 4


@pytest.mark.parametrize('tar', [False, True])
def test_subfolders_of_one_name_are_no_classes(tar, tmp_path):
    for name in ('cat', 'dog'):
        write_classes(tmp_path / 'images' / name, 2, classes=('front', 'back'))
    dataset = open_either(tmp_path / 'images', tar, tmp_path)
    assert class_to_idx(dataset) == {'cat': 0, 'dog': 1} and sorted(read_labels(dataset)) == [0] * 4 + [1] * 4
    below = write_classes(tmp_path / 'few' / 'cat', 2, classes=('front',))
    dataset = open_either(below.parent, tar, tmp_path, class_map={'cat': 0, 'dog': 1})  # as validation images
    assert read_labels(dataset).tolist() == [0, 0]


@pytest.mark.parametrize('tar', [False, True])
def test_loose_images_beside_class_folders_have_no_class(tar, tmp_path):
    root = write_classes(tmp_path / 'images', 2)
    write_images(root, 3, first=50)
    dataset = open_either(root, tar, tmp_path)
    assert class_to_idx(dataset) == {'cat': 0, 'dog': 1}
    assert sorted(read_labels(dataset)) == [-1, -1, -1, 0, 0, 1, 1]


def test_images_of_other_classes_than_those_of_a_map_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    dataset = open_dataset('', str(write_classes(tmp_path, 2)), class_map={'cat': 3})
    assert read_labels(dataset).tolist() == [3, 3] and '2 of other classes' in caplog.text


def test_a_folder_of_tars_has_a_class_for_each(tmp_path):
    for number, name in enumerate(('n02', 'n01')):
        with tarfile.open(tmp_path / f'{name}.tar', 'w') as tar:
            for i in range(3):
                (tmp_path / 'image').write_bytes(encode(picture(10 * number + i), 'JPEG'))
                tar.add(tmp_path / 'image', f'{name}_{i}.JPEG')
    dataset = open_dataset('', str(tmp_path))
    assert class_to_idx(dataset) == {'n01': 0, 'n02': 1} and read_labels(dataset).tolist() == [0] * 3 + [1] * 3
    assert image_name(dataset, 4) == str(tmp_path / 'n02.tar' / 'n02_1.JPEG')
    assert dataset.filename(4) == 'n02.tar/n02_1.JPEG'
    whole = np.asarray(Image.open(tmp_path / 'image'))
    assert np.array_equal(np.asarray(read_image(dataset, 2)[0]), whole)
