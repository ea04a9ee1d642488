import builtins
import math
import os
import stat
import sys

import pytest

from timm_cgh.files import atomic_path, atomic_write
from timm_cgh.report import save_curves

pytest.importorskip('matplotlib', reason='curves are drawn by matplotlib')


def run(epochs, knn_interval=2, warmup=5):
    """Rows such as train.py writes, of a run that learns."""
    rows = []
    for epoch in range(epochs):
        fall = math.exp(-epoch / 10)
        row = {
            'epoch': epoch,
            'train_loss': 7 + 4 * fall,
            'train_loss_gh': 7.5 + fall,
            'train_loss_hg': 6.8 + fall,
            'train_entropy_global': 5 + fall,
            'train_entropy_hyper': 6 + fall,
            'train_std_global': 0.9 - 0.3 * fall,
            'train_std_hyper': 0.8 - 0.3 * fall,
            'lr': 0.06 * 0.5 * (1 + math.cos(math.pi * epoch / epochs)),
        }
        if epoch < warmup:
            row['train_loss_nce'] = 14 + fall
        if epoch % knn_interval == 0:
            row['eval_knn'] = 50 - 15 * fall
        rows.append(row)
    return rows


def picture(path):
    from matplotlib.image import imread
    return imread(path)


def test_curves_are_a_png_of_decent_size(tmp_path):
    levels = {'untrained': 34., 'raw pixels': 39.}
    assert save_curves(run(30), tmp_path / 'curves.png', title='a run', knn_levels=levels)
    height, width = picture(tmp_path / 'curves.png').shape[:2]
    assert width >= 1000 and height >= 600
    assert os.listdir(tmp_path) == ['curves.png']


def test_every_panel_shows_its_columns(tmp_path):
    save_curves(run(6), tmp_path / 'all.png')
    whole = picture(tmp_path / 'all.png')
    for column in ('train_loss_nce', 'lr', 'eval_knn', 'train_entropy_hyper', 'train_std_global'):
        rows = [{k: v for k, v in row.items() if k != column} for row in run(6)]
        save_curves(rows, tmp_path / 'less.png')
        less = picture(tmp_path / 'less.png')
        assert less.shape != whole.shape or (less != whole).any(), column


def test_rows_read_back_from_csv_give_the_same_picture(tmp_path):
    columns = {name for row in run(6) for name in row}
    text = [{name: str(row.get(name, '')) for name in columns} for row in run(6)]
    save_curves(run(6), tmp_path / 'numbers.png')
    save_curves(text, tmp_path / 'text.png')
    assert (picture(tmp_path / 'numbers.png') == picture(tmp_path / 'text.png')).all()


@pytest.mark.parametrize('rows', (
    [],
    run(1),
    [{'epoch': 0}],
    [{'epoch': 0, 'train_loss': float('nan'), 'eval_knn': None, 'lr': ''}, {'epoch': 1, 'train_loss': float('inf')}],
    [{'epoch': 5, 'train_loss_gg': 1.0}, {'epoch': 7, 'train_loss_gg': 2.0}],
))
def test_runs_with_little_to_show_still_give_a_picture(rows, tmp_path):
    assert save_curves(rows, tmp_path / 'curves.png')
    assert picture(tmp_path / 'curves.png').size


def test_drawing_leaves_pyplot_alone(tmp_path):
    before = 'matplotlib.pyplot' in sys.modules
    save_curves(run(3), tmp_path / 'curves.png')
    assert ('matplotlib.pyplot' in sys.modules) == before


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith('matplotlib'):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', missing)
    assert save_curves(run(3), tmp_path / 'curves.png') is False
    assert not os.listdir(tmp_path)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('old')
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write('half of the n')
        file.flush()
        assert path.read_text() == 'old'  # who looks while it is written
        raise KeyError
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['a.txt']


def test_files_are_written_as_text_as_bytes_and_by_name(tmp_path):
    with atomic_write(tmp_path / 'text') as file:
        file.write('größer\r\n')
    with atomic_write(tmp_path / 'bytes', 'wb') as file:
        file.write(b'\x00\x01')
    with atomic_path(tmp_path / 'named') as temp:
        temp.write_bytes(b'named')
    assert (tmp_path / 'text').read_bytes() == 'größer\r\n'.encode()
    assert (tmp_path / 'bytes').read_bytes() == b'\x00\x01'
    assert sorted(os.listdir(tmp_path)) == ['bytes', 'named', 'text']
    with pytest.raises(ValueError, match="'a'"), atomic_write(tmp_path / 'text', 'a'):
        pass


@pytest.mark.skipif(os.name != 'posix', reason='permissions of POSIX')
def test_written_files_have_the_users_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        with atomic_write(tmp_path / 'a') as file:
            file.write('a')
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / 'a').stat().st_mode) == 0o644
