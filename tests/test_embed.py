"""embed.py: embeddings in files, with the images' names."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import embed as script
from conftest import REPOSITORY
from data_files import encode, picture, write_classes, write_images, write_parquet, write_tar
from evaluations import CONFIG, CPU, load_export
from input_errors import check_refused, refused
from script_runner import ENV, call_script, run_two_processes
from timm_cgh.apply.embeddings import Parts, join_parts, read_embeddings
from timm_cgh.apply.images import open_images
from timm_cgh.data import open_dataset
from timm_cgh.eval import create_eval_loader

BROKEN = 'cat/009.png'


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """40 images in two class folders, one of them unreadable."""
    folder = write_classes(tmp_path_factory.mktemp('photos') / 'images', 20)
    (folder / BROKEN).write_bytes((folder / BROKEN).read_bytes()[:-100])  # cut short
    return folder


@pytest.fixture(scope='module')
def expected(encoder, photos):
    """Names and features of the readable images, by timm's model and without our loops."""
    dataset = open_dataset('', str(photos), in_chans=1)
    (images, _), = create_eval_loader(dataset, CONFIG, batch_size=64)
    with torch.no_grad():
        features = load_export(encoder)(images)
    return [name for name in dataset.filenames() if name != BROKEN], features


def arguments(encoder, output, *args):
    return ['--model', f'local-dir:{encoder}', *CPU, '--batch-size', '4', '--output', output, *args]


def embed(encoder, output, *args):
    """Embeddings that a run in this process writes."""
    assert call_script('embed', *arguments(encoder, output, *args)) == 0
    assert not Path(f'{output}.parts').exists()
    return read_embeddings(str(output))


@pytest.mark.parametrize('ending', ['parquet', 'csv', 'npy', 'safetensors'])
def test_rows_are_the_features_of_the_named_files(encoder, photos, expected, tmp_path, ending):
    output = tmp_path / f'out.{ending}'
    names, features = embed(encoder, output, '--data-dir', photos, '--part-size', '10')
    assert names == expected[0]
    torch.testing.assert_close(features, expected[1], rtol=1e-4, atol=1e-5)
    listed = Path(f'{output}.unreadable.txt').read_text().splitlines()
    assert [line.split('\t')[0] for line in listed] == [BROKEN] and 'truncated' in listed[0]


def test_formats_are_those_that_other_libraries_read(encoder, photos, expected, tmp_path):
    pandas = pytest.importorskip('pandas')
    for ending in ('parquet', 'csv', 'npy'):
        embed(encoder, tmp_path / f'out.{ending}', '--data-dir', photos)
    table = pandas.read_parquet(tmp_path / 'out.parquet')
    assert table['file_name'].tolist() == expected[0]
    np.testing.assert_allclose(np.stack(table['embedding']), expected[1], rtol=1e-4, atol=1e-5)
    rows = pandas.read_csv(tmp_path / 'out.csv', index_col='file_name')
    assert np.array_equal(rows.to_numpy(np.float32), np.stack(table['embedding']))  # all digits are written
    assert np.array_equal(np.load(tmp_path / 'out.npy'), np.stack(table['embedding']))


def test_every_source_gives_the_same_rows(encoder, photos, expected, tmp_path):
    files = {name: (photos / name).read_bytes() for name in expected[0]}
    listed = tmp_path / 'list.txt'
    listed.write_text('# chosen\n' + '\n'.join([*expected[0], 'cat/missing.png']) + '\n')
    sources = {
        'tar': ['--data-dir', write_tar(tmp_path / 'images.tar', photos)],
        'table': ['--dataset', f"hfds/{write_parquet(tmp_path / 'table', files)}", '--data-dir', tmp_path / 'cache'],
        'list': ['--data-dir', photos, '--image-list', listed],
        'file': ['--data-dir', photos / expected[0][0]],
    }
    for source, args in sources.items():
        names, features = embed(encoder, tmp_path / f'{source}.npy', *args)
        count = 1 if source == 'file' else len(expected[0])
        found = dict(zip((name.removeprefix('./') for name in names), features))
        assert len(found) == count, source
        for name, row in list(zip(*expected))[:count]:
            key = name if source != 'file' else Path(name).name
            torch.testing.assert_close(found[key], row, rtol=1e-4, atol=1e-5, msg=f'{source}: {name}')
    assert (tmp_path / 'list.npy.unreadable.txt').read_text().startswith('cat/missing.png\t')


def test_names_in_any_script_go_into_the_header_of_safetensors_as_long_as_they_fit(tmp_path, monkeypatch):
    names, path = [f'猫/Ä {number}.png' for number in range(40)], tmp_path / 'out.safetensors'
    parts = Parts(f'{path}.parts', names, dict(model='m'))
    parts.add(torch.arange(80.0).view(40, 2), names, [])
    parts.flush()
    parts.scan()
    size = len(json.dumps(names, ensure_ascii=False).encode())
    monkeypatch.setattr('timm_cgh.apply.embeddings._MAX_HEADER', size)
    with refused('output', '40 names are too many'):
        join_parts(parts, str(path))
    assert not path.exists() and list(parts.folder.iterdir())
    monkeypatch.setattr('timm_cgh.apply.embeddings._MAX_HEADER', size + 400)
    join_parts(parts, str(path))
    assert read_embeddings(str(path)).names == names


def test_images_of_one_name_are_told_apart(tmp_path):
    table = write_parquet(tmp_path / 'table', {'a.png': encode(picture(0)), 'b.png': encode(picture(1))})
    images = open_images(CONFIG, dataset=f'hfds/{table}', data_dir=str(tmp_path / 'cache'))
    assert images.names == ['a.png', 'b.png']
    twice = open_images(CONFIG, image_list=str(_list(tmp_path, 'a.png', 'b.png', 'a.png')))
    assert twice.names == ['a.png', 'b.png', 'a.png#2']


def _list(folder, *lines):
    path = folder / 'names.txt'
    path.write_text('\n'.join(lines) + '\n')
    return path


def test_a_stopped_run_goes_on_and_ends_with_the_same_file(encoder, photos, tmp_path, monkeypatch):
    args = ['--data-dir', photos, '--part-size', '8']
    embed(encoder, tmp_path / 'whole.npy', *args)

    flush, parts = Parts.flush, []

    def stop_after_three(self):
        flush(self)
        parts.append(len(self.names))
        if len(parts) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Parts, 'flush', stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        embed(encoder, tmp_path / 'killed.npy', *args)
    assert not (tmp_path / 'killed.npy').exists()
    embed(encoder, tmp_path / 'killed.npy', *args)
    assert len(parts) == 6  # the three of before are not computed again
    for name in ('{}.npy', '{}.names.txt', '{}.npy.unreadable.txt'):
        whole, killed = (tmp_path / name.format(run) for run in ('whole', 'killed'))
        assert whole.read_bytes() == killed.read_bytes(), name


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(encoder, photos, tmp_path):
    embed(encoder, tmp_path / 'one.parquet', '--data-dir', photos)
    done = run_two_processes(
        'embed.py', *arguments(encoder, tmp_path / 'two.parquet', '--data-dir', photos, '--part-size', '8'))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_embeddings(str(tmp_path / f'{name}.parquet')) for name in ('one', 'two'))
    assert one.names == two.names and torch.equal(one.features, two.features)


def test_parts_of_another_model_are_refused(encoder, photos, tmp_path, capsys):
    output = tmp_path / 'out.npy'
    parts = Parts(f'{output}.parts', ['cat/000.png'], dict(model='another'))
    parts.add(torch.zeros(1, 3), ['cat/000.png'], [])
    parts.flush()
    check_refused(capsys, script, arguments(encoder, output, '--data-dir', photos),
                  f'--output {output}.parts', 'other settings: model')


@pytest.mark.parametrize('args, named', [
    (['--data-dir', 'b'], 'other settings: source'),
    (['--data-dir', 'a', '--split', 'train'], 'other settings: source'),
    (['--data-dir', 'a', '--max-pixels', '300'], 'other settings: decoding'),
])
def test_parts_of_other_images_of_the_same_names_are_refused(encoder, tmp_path, capsys, monkeypatch, args, named):
    for folder in ('a', 'b', 'a/train'):
        write_images(tmp_path / folder, 2, first=10 * len(folder))
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(script, 'join_parts', mock.Mock(side_effect=KeyboardInterrupt))
        embed(encoder, 'out.npy', '--data-dir', 'a')
    check_refused(capsys, script, arguments(encoder, 'out.npy', *args), '--output out.npy.parts', named)
    embed(encoder, 'out.npy', '--data-dir', tmp_path / 'b' / '..' / 'a')


def test_a_finished_file_is_replaced_only_on_demand(encoder, photos, tmp_path, capsys):
    output = tmp_path / 'out.npy'
    output.write_bytes(b'precious')
    check_refused(capsys, script, arguments(encoder, output, '--data-dir', photos), 'exists; --overwrite replaces it')
    assert output.read_bytes() == b'precious'
    assert len(embed(encoder, output, '--data-dir', photos, '--overwrite').names) == 39


@pytest.mark.parametrize('args, named', [
    (['--output', 'out.txt'], ['--output out.txt: must end in .parquet']),
    (['--output', 'out.parquet'], ["--output out.parquet: needs pyarrow, pip install 'timm-cgh[embed]'"]),
    (['--output', 'out.npy'], ['--data-dir: say which images, by it, --image-list or --dataset']),
    (['--output', 'out.npy', '--image-list', 'missing.txt'], ['--image-list missing.txt: ', 'No such file']),
    (['--output', 'out.npy', '--data-dir', 'missing'], ['--data-dir missing: no such']),
    (['--output', 'out.npy', '--data-dir', '.', '--split', 'test'], ['--split test: not in .']),
    (['--output', 'out.npy', '--dataset', 'wds/x', '--data-dir', '.'], ['--dataset wds/x: a stream']),
])
def test_bad_input_is_one_line_that_names_the_option(encoder, tmp_path, capsys, monkeypatch, args, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('timm_cgh.apply.embeddings.find_spec', lambda name: None)
    check_refused(capsys, script, ['--model', f'local-dir:{encoder}', *CPU, *args], *named)


def test_images_that_are_all_unreadable_leave_no_file(encoder, tmp_path, capsys):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / 'a.jpg').write_bytes(b'no image')
    check_refused(capsys, script, arguments(encoder, tmp_path / 'out.npy', '--data-dir', tmp_path / 'images'),
                  'none of 1 images can be read, a.jpg among them')
    assert not (tmp_path / 'out.npy').exists()


# ---- at scale

def _resident(process):
    """MiB of resident memory."""
    for line in Path(f'/proc/{process.pid}/status').read_text().splitlines():
        if line.startswith('VmRSS'):
            return int(line.split()[1]) / 1024
    return 0.0


def _watch(output, images, *, part_size, kill_at=None):
    """Run embed.py in its own process; resident memory at each part, in MiB, until it ends or is killed."""
    # 1024 features, so that those of all images are 400 MB
    command = [
        sys.executable, REPOSITORY / 'embed.py', '--model', 'mobilenetv3_small_050', '--no-pretrained', '--data-dir',
        images, '--img-size', '16', '--output', output, '--part-size', part_size, *CPU]
    process = subprocess.Popen([str(part) for part in command], env=ENV)
    parts, memory = Path(f'{output}.parts'), {}
    while process.poll() is None:
        done = part_size * len(list(parts.glob('*.safetensors'))) if parts.exists() else 0
        if done:
            memory[done] = max(memory.get(done, 0), _resident(process))
        if kill_at and done >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    assert process.returncode == (-signal.SIGKILL if kill_at else 0)
    return memory


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_memory_stays_flat_over_100_000_images_and_a_killed_run_ends_with_the_same_file(tmp_path):
    for number in range(100):
        picture(number).save(tmp_path / f'{number}.png')
    for folder in range(100):
        (tmp_path / 'images' / f'{folder:02d}').mkdir(parents=True)
        for number in range(1000):
            os.link(tmp_path / f'{number % 100}.png', tmp_path / 'images' / f'{folder:02d}' / f'{number:03d}.png')
    (tmp_path / 'images' / '50' / '500.png').unlink()
    (tmp_path / 'images' / '50' / '500.png').write_bytes(b'no image')

    memory = _watch(tmp_path / 'whole.npy', tmp_path / 'images', part_size=2048)
    early = max(value for done, value in memory.items() if done <= 10_240)
    growth = max(memory.values()) - early
    print(f'resident: {early:.0f} MiB after 10,000 images, at most {growth:.0f} MiB more until the end')
    assert max(memory) > 95_000 and growth < 200

    _watch(tmp_path / 'killed.npy', tmp_path / 'images', part_size=2048, kill_at=30_000)
    _watch(tmp_path / 'killed.npy', tmp_path / 'images', part_size=2048)
    for name in ('{}.npy', '{}.names.txt', '{}.npy.unreadable.txt'):
        whole, killed = (tmp_path / name.format(run) for run in ('whole', 'killed'))
        assert whole.read_bytes() == killed.read_bytes(), name
    assert len(read_embeddings(str(tmp_path / 'whole.npy')).names) == 99_999
    shutil.rmtree(tmp_path / 'images')
