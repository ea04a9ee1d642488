"""Batches of views do not depend on workers and processes; broken images are replaced and named."""
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from conftest import REPOSITORY
from data_files import encode, picture, write_parquet, write_shards, write_tar
from input_errors import refused
from timm_cgh.data import (
    Batch, Digits, EpochBatchSampler, ViewDataset, ViewsToDevice, create_view_loader, num_images, open_dataset,
    two_views)
from timm_cgh.data.augment import photometric
from timm_cgh.errors import InputError

BROKEN = {
    'truncated.jpg': encode(picture(99, 64), 'JPEG')[:900],
    'text.jpg': b'this is not an image',
    'empty.png': b'',
}


@pytest.fixture
def folder(tmp_path):
    """Two classes of four images, three broken ones among them."""
    for i in range(8):
        path = tmp_path / 'images' / f'class{i % 2}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (20, 16)).save(path)
    for name, data in BROKEN.items():
        (tmp_path / 'images' / 'class0' / name).write_bytes(data)
    return tmp_path / 'images'


def digits_loader(batch_size=50, **options):
    return create_view_loader(Digits('train'), two_views(8), batch_size, seed=7, **options)


def epoch_of(loader, epoch, start_batch=0):
    loader.set_epoch(epoch, start_batch)
    return list(loader)


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others):
        assert torch.equal(batch.index, other.index) and torch.equal(batch.target, other.target)
        assert all(torch.equal(a, b) for a, b in zip(batch.views, other.views))
        assert all(torch.equal(a, b) for a, b in zip(batch.params, other.params) if a is not None)
        assert batch.unreadable == other.unreadable


def test_workers_change_nothing_and_persistent_ones_see_each_epoch():
    alone, helped = digits_loader(200), digits_loader(200, workers=2)
    epochs = [epoch_of(alone, epoch) for epoch in range(3)]
    for epoch in range(3):
        assert_same(epoch_of(helped, epoch), epochs[epoch])
    assert not torch.equal(epochs[0][0].index, epochs[1][0].index)


def test_the_same_image_is_cut_anew_each_epoch():
    views = ViewDataset(Digits(), two_views(8), seed=0)
    assert not torch.equal(views[0, 5][0][0], views[1, 5][0][0])
    assert torch.equal(views[1, 5][0][0], views[1, 5][0][0])


def test_spawned_workers_give_the_same(folder):
    dataset = open_dataset('', str(folder))
    options = dict(batch_size=4, seed=1)
    alone = create_view_loader(dataset, two_views(8), **options)
    spawned = create_view_loader(dataset, two_views(8), workers=1, multiprocessing_context='spawn', **options)
    assert_same(epoch_of(spawned, 2), epoch_of(alone, 2))


def test_resume_within_an_epoch_gives_the_remaining_batches():
    for workers in (0, 2):
        loader = digits_loader(300, workers=workers)
        whole = epoch_of(loader, 4)
        assert len(whole) == len(loader) == 4
        assert_same(epoch_of(loader, 4, 3), whole[3:])
        assert epoch_of(loader, 4, 4) == []
        assert_same(epoch_of(loader, 4), whole)


def test_an_epoch_left_early_does_not_spill_into_the_next():
    loader = digits_loader(100, workers=2)
    loader.set_epoch(0)
    for _ in loader:
        break
    assert_same(epoch_of(loader, 1), epoch_of(digits_loader(100), 1))


def test_two_processes_see_the_batches_of_one():
    one = epoch_of(digits_loader(100), 3)
    ranks = [epoch_of(digits_loader(50, rank=rank, world_size=2), 3) for rank in range(2)]
    assert len(one) == len(ranks[0]) == len(ranks[1])
    for batch, *parts in zip(one, *ranks):
        assert not set(parts[0].index.tolist()) & set(parts[1].index.tolist())
        assert torch.equal(batch.index, torch.cat([part.index for part in parts]))
        for view in range(2):
            assert torch.equal(batch.views[view], torch.cat([part.views[view] for part in parts]))


def test_an_epoch_holds_each_image_once_and_drops_the_incomplete_batch():
    sampler = EpochBatchSampler(107, 10, seed=3)
    seen = [index for batch in sampler for _, index in batch]
    assert len(sampler) == 10 and len(seen) == len(set(seen)) == 100
    assert set(seen) < set(range(107))
    assert seen != sorted(seen)
    sampler.set_epoch(1)
    assert [index for batch in sampler for _, index in batch] != seen
    assert [i for b in EpochBatchSampler(107, 10, seed=4) for _, i in b] != seen


def test_batch_larger_than_the_data_set_is_refused_with_the_counts():
    with refused('batch_size=5000', '1433 images'):
        digits_loader(5000)
    with refused('batch_size=1000 in each of 2 processes', 'at most 716'):
        digits_loader(1000, world_size=2)
    assert len(digits_loader(1433)) == 1


def test_batch_has_views_parameters_and_labels():
    dataset = Digits()
    batch = epoch_of(digits_loader(20), 0)[0]
    assert isinstance(batch, Batch)
    assert [v.shape for v in batch.views] == [(20, 1, 8, 8)] * 2 and batch.views[0].dtype == torch.uint8
    assert batch.params[0] is None and batch.params[1].shape == (20, 7)
    assert batch.target.dtype == batch.index.dtype == torch.int64
    assert batch.target.tolist() == [dataset.targets[i] for i in batch.index.tolist()]
    for place, index in enumerate(batch.index.tolist()):
        views, params, *_ = ViewDataset(dataset, two_views(8), seed=7)[0, index]
        assert all(torch.equal(stacked[place], view) for stacked, view in zip(batch.views, views))
        assert torch.equal(batch.params[1][place], params[1])


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('source', ['folder', 'tar', 'subset', 'hfds'])
def test_broken_images_are_replaced_and_named(folder, tmp_path, source, workers):
    if source == 'tar':
        dataset = open_dataset('', str(write_tar(tmp_path / 'images.tar', folder)))
    elif source == 'hfds':
        dataset = open_dataset(f'hfds/{parquet_of(folder, tmp_path)}', str(tmp_path / 'cache'))
    else:
        dataset = open_dataset('', str(folder))
    if source == 'subset':
        dataset = Subset(dataset, list(range(len(dataset)))[::-1])
    loader = create_view_loader(dataset, two_views(8), batch_size=11, workers=workers)
    batch, = epoch_of(loader, 0)
    assert {name.partition(' (')[0].rpartition('/')[2] for name in batch.unreadable} == set(BROKEN)
    assert batch.views[0].shape == (11, 3, 8, 8) and sorted(batch.index.tolist()) == list(range(11))
    assert set(batch.target.tolist()) == {0, 1}


def parquet_of(folder, tmp_path, labelled=True):
    paths = sorted(folder.rglob('*.*'))
    labels = [int(path.parent.name == 'class1') for path in paths] if labelled else None
    return write_parquet(tmp_path / 'parquet', {path.name: path.read_bytes() for path in paths}, labels)


@pytest.mark.parametrize('workers', [0, 1])
def test_images_that_are_all_broken_end_the_run_in_one_line(tmp_path, workers):
    for i in range(12):
        (tmp_path / f'{i}.jpg').write_bytes(b'nothing')
    loader = create_view_loader(open_dataset('', str(tmp_path)), two_views(8), batch_size=4, workers=workers)
    with refused('data_dir', 'most images cannot be read: none of 12 that were tried', '.jpg'):
        epoch_of(loader, 0)


def test_workers_end_at_once_after_an_error(tmp_path):
    for i in range(12):
        (tmp_path / f'{i}.jpg').write_bytes(b'nothing')
    loader = create_view_loader(open_dataset('', str(tmp_path)), two_views(8), batch_size=4, workers=2)
    with pytest.raises(InputError):
        epoch_of(loader, 0)
    start = time.perf_counter()
    del loader
    gc.collect()
    assert time.perf_counter() - start < 4  # torch gives its workers 5 s each before it uses force
    assert not multiprocessing.active_children()


def test_workers_outlive_every_sigterm_but_not_a_kill():
    loader = digits_loader(300, workers=1)
    whole = epoch_of(loader, 0)
    worker, = multiprocessing.active_children()
    for _ in range(2):
        os.kill(worker.pid, signal.SIGTERM)  # a scheduler's, to the whole process group, and torchrun's relay of it
        assert_same(epoch_of(loader, 0), whole)
    worker.kill()
    with pytest.raises(RuntimeError, match='DataLoader worker'):
        worker.join(60)
        epoch_of(loader, 1)


def test_a_process_that_fails_while_workers_wait_ends():
    code = """
from timm_cgh.data import Digits, create_view_loader, two_views
batches = iter(create_view_loader(Digits(), two_views(8), batch_size=4, workers=2))
next(batches)
raise RuntimeError('out of memory')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().endswith('RuntimeError: out of memory')  # and no report of a worker after it


def test_images_of_every_mode_are_read(tmp_path):
    grey = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
    colour = Image.fromarray(np.stack([grey] * 3, axis=-1))
    colour.convert('CMYK').save(tmp_path / '0.jpg', quality=95)
    colour.quantize(256).save(tmp_path / '1.png')
    colour.convert('RGBA').save(tmp_path / '2.png')
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / '3.png')
    Image.fromarray(grey).convert('LA').save(tmp_path / '4.png')
    palette = colour.quantize(256)
    palette.save(tmp_path / '5.png', transparency=bytes([0] * 128 + [255] * 128))
    Image.fromarray(grey > 127).save(tmp_path / '6.png')
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / '7.tif')
    Image.fromarray(grey.astype(np.int32) * 257).save(tmp_path / '8.tif')
    for mode, chans in (('RGB', 3), ('L', 1)):
        dataset = open_dataset('', str(tmp_path), in_chans=chans, input_key='.jpg;.png;.tif')
        views = ViewDataset(dataset, [two_views(32, scale=(1, 1), ratio=(1, 1), hflip=0)[0]], 0)
        for index in range(9):
            (view,), _, _, _, unreadable = views[0, index]
            assert not unreadable
            expected = torch.from_numpy((grey > 127) * 255 if index == 6 else grey).float()
            assert (view.float() - expected).abs().max() <= 6, f'image {index} in mode {mode}'


def test_views_are_normalised_on_the_device():
    batch = epoch_of(digits_loader(20), 0)[0]
    weak, contrastive = ViewsToDevice([0.4], [0.2], 'cpu')(batch)
    torch.testing.assert_close(weak, (batch.views[0] / 255 - 0.4) / 0.2)
    torch.testing.assert_close(contrastive, (photometric(batch.views[1], batch.params[1]) - 0.4) / 0.2)


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_prefetched_views_are_those_of_the_batches_in_their_order(device):
    if device == 'cuda' and not torch.cuda.is_available():
        pytest.skip('needs a GPU')
    loader = digits_loader(300, pin_memory=device == 'cuda')
    to_device = ViewsToDevice([0.4], [0.2], device)
    expected = [[view.cpu() for view in to_device(batch)] for batch in epoch_of(loader, 1)]
    loader.set_epoch(1)
    found = []
    for _, views in to_device.prefetch(loader):
        found.append([view.clone() for view in views])
        for view in views:
            view.fill_(float('nan'))  # memory handed back by this step must not be that of the next one's views
        del views
    assert len(found) == len(expected) == 4
    for views, others in zip(found, expected):
        assert all(torch.equal(view.cpu(), other) for view, other in zip(views, others))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_no_epoch_takes_more_gpu_memory_than_the_first():
    to_device, loader, allocated = ViewsToDevice([0.4], [0.2], 'cuda'), digits_loader(300, pin_memory=True), []
    for epoch in range(3):
        loader.set_epoch(epoch)
        for _ in to_device.prefetch(loader):
            pass
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[2] == allocated[0]


def test_pinned_memory_can_be_asked_for():
    loader = digits_loader(20, pin_memory=True)
    assert loader.loader.pin_memory
    if torch.cuda.is_available():
        assert epoch_of(loader, 0)[0].views[0].is_pinned()


# ---- streams


def open_stream(root, split, batch_size=8, **options):
    return open_dataset('wds/x', str(root), split, is_training=True, batch_size=batch_size, **options)


@pytest.mark.parametrize('workers', [0, 2])
def test_stream_gives_full_batches(tmp_path, workers):
    stream = open_stream(tmp_path, write_shards(tmp_path, 14), batch_size=8)
    assert num_images(stream) == 28
    loader = create_view_loader(stream, two_views(8), batch_size=8, workers=workers)
    assert len(loader) == 3  # timm's own count is rounded up to whole batches of each worker
    epochs = [epoch_of(loader, epoch) for epoch in range(2)]
    for batches in epochs:
        assert len(batches) == 3
        assert all(batch.views[1].shape == (8, 3, 8, 8) for batch in batches)
        assert set(torch.cat([batch.target for batch in batches]).tolist()) <= {0, 1, 2}
        assert all((batch.index == -1).all() for batch in batches)
    assert not torch.equal(epochs[0][0].views[0], epochs[1][0].views[0])
    assert len(epoch_of(loader, 1, 2)) == 1


@pytest.mark.parametrize('workers', [0, 2])
def test_unlabelled_stream_is_read_too(tmp_path, workers):
    stream = open_stream(tmp_path, write_shards(tmp_path, 8, labelled=False))
    batches = epoch_of(create_view_loader(stream, two_views(8), batch_size=8, workers=workers), 0)
    assert len(batches) == 2 and all((batch.target == -1).all() for batch in batches)


@pytest.mark.parametrize('workers', [0, 2])
def test_broken_images_of_a_stream_are_skipped_and_named(tmp_path, workers):
    stream = open_stream(tmp_path, write_shards(tmp_path, 8, broken=(0, 3, 9)))
    batches = epoch_of(create_view_loader(stream, two_views(8), batch_size=8, workers=workers), 0)
    assert [len(batch.target) for batch in batches] == [8, 8]
    named = {name.partition(' ')[0].rpartition('/')[2] for batch in batches for name in batch.unreadable}
    assert named == {'image00000', 'image00003', 'image00009'}


def test_shards_of_jpeg_files_or_with_another_key_are_read(tmp_path):
    for extension, input_key in (('jpeg', None), ('thumb', 'thumb')):
        root = tmp_path / extension
        stream = open_stream(root, write_shards(root, 4, extension=extension), batch_size=8, input_key=input_key)
        batch, = epoch_of(create_view_loader(stream, two_views(8), batch_size=8), 0)
        assert len(batch.target) == 8 and not batch.unreadable


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('fault, at_fault', [('extension', 'dataset'), ('broken', 'dataset'), ('empty', 'workers')])
def test_stream_without_a_usable_image_ends_the_run_in_one_line(tmp_path, fault, at_fault, workers):
    split = write_shards(tmp_path, 0 if fault == 'empty' else 4, extension='txt' if fault == 'extension' else 'png',
                         broken=range(8) if fault == 'broken' else ())
    if fault == 'empty':
        split = split.replace('|0', '|16')
    loader = create_view_loader(open_stream(tmp_path, split), two_views(8), batch_size=8, workers=workers)
    with refused(at_fault):
        epoch_of(loader, 0)


def test_stream_with_more_workers_than_shards_ends_the_run_in_one_line(tmp_path):
    loader = create_view_loader(
        open_stream(tmp_path, write_shards(tmp_path, 16, shards=1)), two_views(8), batch_size=8, workers=2)
    with refused('workers', 'shards'):
        epoch_of(loader, 0)


def test_batch_larger_than_a_stream_is_refused(tmp_path):
    stream = open_stream(tmp_path, write_shards(tmp_path, 4), batch_size=16)
    with refused('batch_size=16', '8 images'):
        create_view_loader(stream, two_views(8), batch_size=16)


@pytest.mark.parametrize('labelled', [True, False])
def test_hugging_face_stream_of_a_local_folder(folder, tmp_path, monkeypatch, labelled):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for name in BROKEN:
        (folder / 'class0' / name).unlink()
    path = parquet_of(folder, tmp_path, labelled)
    stream = open_dataset(
        f'hfids/{path}', str(tmp_path / 'cache'), is_training=True, batch_size=4, num_samples=8)
    batches = epoch_of(create_view_loader(stream, two_views(8), batch_size=4), 0)
    assert len(batches) == 2
    assert set(torch.cat([batch.target for batch in batches]).tolist()) <= ({0, 1} if labelled else {-1})


def test_unlabelled_hugging_face_data_set(folder, tmp_path):
    dataset = open_dataset(f'hfds/{parquet_of(folder, tmp_path, labelled=False)}', str(tmp_path / 'cache'))
    batch, = epoch_of(create_view_loader(dataset, two_views(8), batch_size=11), 0)
    assert (batch.target == -1).all() and len(batch.unreadable) >= len(BROKEN)


def no_shared_memory(_):
    """Collate as torch does in a worker where /dev/shm is full."""
    raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)')


def test_full_shared_memory_names_the_options_that_help(monkeypatch):
    monkeypatch.setattr('timm_cgh.data.loader._collate', no_shared_memory)
    loader = create_view_loader(Digits(), two_views(16), batch_size=4, workers=1)
    with pytest.raises(InputError, match=r'workers: the shared memory .* is full.*`batch_size`.*--shm-size'):
        list(loader)
