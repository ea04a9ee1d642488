"""Images that are not photographs of three channels, from the command line to the evaluations."""
import json

import numpy as np
import pytest
from PIL import Image

from data_files import write_shards
from script_runner import call_script
from timm_cgh.data import create_view_loader, open_dataset, two_views
from timm_cgh.data.views import cut_views
from timm_cgh.train.outputs import warn_if_flat
from training import TINY, check_ok, check_refused, make_images, read_summary, train

CPU = ['--device', 'cpu', '--workers', 0, '--batch-size', 8]


def write_bands(folder):
    """NumPy files of five bands of 12 bits, 20 x 28 px, in splits of two classes; one of another size."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 12), ('val', 4)):
        for name, level in (('dark', 600), ('light', 3000)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                bands = rng.normal(level, 300, (20, 28, 5)).clip(0, 4095).astype(np.uint16)
                np.save(folder / split / name / f'{i}.npy', bands)
    np.save(folder / 'train' / 'dark' / 'large.npy', np.zeros((40, 40, 5), np.uint16))
    return folder


def test_bands_of_any_number_and_range_train_and_are_evaluated_at_two_sides(tmp_path):
    data = ['--data-dir', write_bands(tmp_path / 'data')]
    decoding = ['--pixel-range', 0, 4095, '--max-pixels', 600]  # the evaluations take it from the run
    text = check_ok(train(*TINY, *data, *decoding, '--in-chans', 5, '--img-size', 16, 24, '--epochs', 1,
                          '--output', tmp_path, '--experiment', 'run'))
    assert '25 images of 16x24 px' in text and 'large.npy (40 x 40 px, `max_pixels` is 600)' in text
    assert float(read_summary(tmp_path / 'run')[0]['eval_knn']) > 80  # the classes differ in brightness
    config = json.loads((tmp_path / 'run' / 'export' / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [5, 16, 24]
    for script, options in (('eval_knn', ['--checkpoint', tmp_path / 'run' / 'last.pth.tar']),
                            ('eval_linear', ['--model', f"local-dir:{tmp_path / 'run' / 'export'}", '--epochs', 1])):
        results = tmp_path / f'{script}.json'
        assert call_script(
            script, *data, *options, *CPU, '--output', tmp_path / script, '--results-file', results) == 0
        found = json.loads(results.read_text())
        assert (found['train_images'], found['train_unreadable'], found['val_images']) == (24, 1, 8)
        assert found['top1'] > 80 or script == 'eval_linear'


def test_multi_crop_and_three_sides_are_refused_for_images_with_two_sides(tmp_path, capsys):
    data = ['--data-dir', make_images(tmp_path / 'images'), '--output', tmp_path, *TINY]
    check_refused(capsys, [*data, '--img-size', 16, 24, '--multi-crop'], '--multi-crop', '--img-size')
    check_refused(capsys, [*data, '--img-size', 16, 24, 8], '--img-size 16 24 8', 'height and width')
    check_refused(capsys, [*data, '--pixel-range', 5, 5], '--pixel-range 5 5', 'below')
    check_refused(capsys, [*data, '--in-chans', 0], '--in-chans 0')


@pytest.mark.parametrize('size, width, height', [((16, 48), 90, 30), ((48, 16), 30, 90)])
def test_crops_for_views_with_two_sides_have_their_shape(size, width, height):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    views, _ = cut_views(image, two_views(size, scale=(1, 1), ratio=(1, 1), hflip=0), 0, 0, 0)
    assert views[0].shape == (3, *size)
    whole = np.asarray(image.resize(size[::-1], Image.BILINEAR))  # nothing is cut away, nothing stretched
    assert abs(views[0].permute(1, 2, 0).numpy().astype(int) - whole).max() <= 2


def test_a_login_in_data_dir_stays_out_of_the_files_and_the_log_of_a_run(tmp_path):
    """The shards come from a command; a broken image is named."""
    split = write_shards(tmp_path / 'shards', 8, broken=(3,))
    command = f"pipe:true https://me:SECRET@host; cat {tmp_path / 'shards'}"
    text = check_ok(train(*TINY, '--dataset', 'wds/', '--data-dir', command, '--train-split', split, '--epochs', 1,
                          '--output', tmp_path, '--experiment', 'run', '--knn-interval', 0))
    assert 'SECRET' not in text and 'image00003' in text
    for path in (tmp_path / 'run').rglob('*'):
        assert path.is_dir() or b'SECRET' not in path.read_bytes(), path.name


@pytest.mark.parametrize('pixel_range, warns', [(None, True), ((0, 4095), False)])
def test_images_that_come_out_nearly_black_are_warned_of(tmp_path, caplog, pixel_range, warns):
    bands = np.random.default_rng(0).integers(0, 4096, (20, 20), dtype=np.uint16)  # 12 bits
    Image.fromarray(bands).save(tmp_path / 'a.png')
    dataset = open_dataset('', str(tmp_path), pixel_range=pixel_range)
    warn_if_flat(create_view_loader(dataset, two_views(16), 1).read([0]).views[0])
    assert ('`pixel_range`' in caplog.text) == warns
