"""write_shards.py: WebDataset shards of images, as they are."""
import json
from urllib.parse import unquote

import pytest

import write_shards as script
from data_files import encode, picture, write_classes, write_images, write_parquet
from input_errors import check_refused
from script_runner import call_script
from timm_cgh.data import num_images, open_dataset

wds = pytest.importorskip('webdataset')
NAMES = [
    'cat/plain.png', 'cat/two.dots.JPG', 'cat/100%.png', 'dog/Käfer 1.webp', 'dog/same.png', 'dog/same.jpg',
    'loose.png']


def write_shards(output, *args):
    assert call_script('write_shards', '--workers', '0', '--output', output, *args) == 0
    return json.loads((output / '_info.json').read_text())


def read_samples(folder):
    """Key -> (ending, bytes, class) of the samples of a split, as webdataset reads them, in their order."""
    samples = {}
    for path in sorted(folder.glob('train-*.tar')):
        for sample in wds.DataPipeline(wds.SimpleShardList(str(path)), wds.tarfile_to_samples()):
            key, label = sample['__key__'], sample.pop('cls', None)
            (ending, data), = ((name, value) for name, value in sample.items() if not name.startswith('__'))
            samples[key] = ending, data, label
    return samples


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(NAMES):
        path = tmp_path / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(number), {'.png': 'PNG', '.webp': 'WebP'}.get(path.suffix, 'JPEG')))
    (tmp_path / 'images' / 'cat' / 'broken.png').write_bytes(path.read_bytes()[:-40])
    return tmp_path / 'images'


def test_files_keep_their_bytes_names_and_classes_and_broken_ones_are_listed(folder, tmp_path):
    info = write_shards(tmp_path / 'shards', '--data-dir', folder, '--shard-images', '4')
    samples = read_samples(tmp_path / 'shards')
    names = {f'{unquote(key)}.{ending}': (data, label) for key, (ending, data, label) in samples.items()}
    expected = {name.replace('JPG', 'jpg') for name in NAMES} - {'dog/same.png'} | {'dog/same#2.png'}
    assert names.keys() == expected and len(samples) == len(NAMES)
    for name, (data, label) in names.items():
        name = name.replace('two.dots.jpg', 'two.dots.JPG').replace('#2', '')
        assert data == (folder / name).read_bytes()
        assert label == {'cat': b'0', 'dog': b'1'}.get(name.partition('/')[0])
    assert info['class_to_idx'] == {'cat': 0, 'dog': 1} and info['splits']['train']['shard_lengths'] == [4, 3]
    assert (tmp_path / 'shards' / 'train.unreadable.txt').read_text().startswith('cat/broken.png\t')


def test_equal_seeds_give_equal_shards_in_an_order_unlike_that_of_the_names(tmp_path):
    write_images(tmp_path / 'images', 12)
    orders = []
    for output, seed in (('a', 1), ('b', 1), ('c', 2)):
        write_shards(tmp_path / output, '--data-dir', tmp_path / 'images', '--seed', seed)
        orders.append(list(read_samples(tmp_path / output)))
    assert orders[0] == orders[1] != orders[2] and orders[0] != sorted(orders[0]) == sorted(orders[2])
    assert (tmp_path / 'a' / 'train-000000.tar').read_bytes() == (tmp_path / 'b' / 'train-000000.tar').read_bytes()


def test_timm_reads_the_splits_by_name_and_knows_their_sizes(tmp_path):
    for split, count in (('train', 6), ('val', 4)):
        write_classes(tmp_path / 'images' / split, count)
        info = write_shards(
            tmp_path / 'shards', '--data-dir', tmp_path / 'images', '--split', split, '--shard-mb', '0.003')
    assert len(info['splits']['train']['filenames']) > 1
    for split, count in (('train', 12), ('val', 8)):
        dataset = open_dataset('wds/', str(tmp_path / 'shards'), split)
        assert num_images(dataset) == count
        assert sorted(label for _, label in dataset) == [0] * (count // 2) + [1] * (count // 2)


def test_parquet_and_lists_of_files_are_sources_too(tmp_path, caplog):
    caplog.set_level('INFO', 'data')
    files = {f'{number}.png': encode(picture(number)) for number in range(4)}
    write_parquet(tmp_path / 'table', files, [0, 1, 1, 0], ['cat', 'dog'])
    write_shards(tmp_path / 'a', '--dataset', f"hfds/{tmp_path / 'table'}", '--data-dir', tmp_path / 'cache')
    labels = {'0': b'0', '1': b'1', '2': b'1', '3': b'0'}
    assert read_samples(tmp_path / 'a') == {key: ('png', files[f'{key}.png'], label) for key, label in labels.items()}

    assert 'without classes' not in caplog.text

    write_images(tmp_path / 'images', 3)
    (tmp_path / 'list.txt').write_text('002.png\nmissing.png\n')
    write_shards(tmp_path / 'b', '--data-dir', tmp_path / 'images', '--image-list', tmp_path / 'list.txt')
    assert list(read_samples(tmp_path / 'b')) == ['002'] and '1 shards, without classes' in caplog.text
    assert (tmp_path / 'b' / 'train.unreadable.txt').read_text().startswith('missing.png\t')


@pytest.mark.parametrize('args, named', [
    (['--data-dir', 'images'], '--output shards: has train-000000.tar already'),
    (['--data-dir', 'other', '--split', 'target'], '--split target: must be a plain name'),
    (['--data-dir', 'other', '--split', 'val'], '--output shards: the splits in it have other classes'),
    (['--dataset', 'digits', '--split', 'validation'], '--dataset: its images are not files'),
])
def test_bad_input_is_one_line_that_names_the_option(tmp_path, capsys, monkeypatch, args, named):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / 'images', 2)
    for split in ('val', 'target'):
        write_classes(tmp_path / 'other' / split, 2, classes=('dog', 'eel'))
    write_shards(tmp_path / 'shards', '--data-dir', 'images')
    before = {path: path.read_bytes() for path in (tmp_path / 'shards').iterdir()}
    check_refused(capsys, script, ['--workers', '0', '--output', 'shards', *args], named)
    assert {path: path.read_bytes() for path in (tmp_path / 'shards').iterdir()} == before
