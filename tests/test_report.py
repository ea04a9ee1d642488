import math
import os
import stat
import sys

import pytest

from timm_cgh.files import atomic_path, atomic_write
from timm_cgh.report import main, parser, save_curves
from timm_cgh.summary import Summary

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
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
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


# ---- several runs


def write_run(folder, rows):
    summary = Summary(str(folder / 'summary.csv'))
    folder.mkdir()
    for row in rows:
        summary.add(row)
    return folder


def drawn_lines(monkeypatch):
    """What `Axes.plot` is asked for from now on, as (colour, style, x, y)."""
    from matplotlib.axes import Axes
    lines, plot = [], Axes.plot

    def record(axes, x, y, **style):
        lines.append((style['color'], style['linestyle'], list(x), list(y)))
        return plot(axes, x, y, **style)

    monkeypatch.setattr(Axes, 'plot', record)
    return lines


def test_each_run_has_its_colour_and_each_context_its_line(tmp_path, monkeypatch):
    lines = drawn_lines(monkeypatch)
    plain = [{'epoch': i, 'train_loss': 8.0 - i, 'train_std_global': 0.5} for i in range(3)]
    runs = [write_run(tmp_path / 'cgh', run(4)), write_run(tmp_path / 'moco', plain)]
    assert main([*map(str, runs), '--names', 'CGH', 'MoCo-v2', '--title', 'two', '--out', str(tmp_path / 'two.png')]) == 0
    assert picture(tmp_path / 'two.png').shape[1] >= 1000
    cgh, moco = dict.fromkeys(color for color, *_ in lines)
    assert [(style, y) for color, style, _, y in lines if color == moco] == [('-', [8.0, 7.0, 6.0]), ('-', [0.5] * 3)]
    mine = {tuple(y): (style, x) for color, style, x, y in lines if color == cgh}
    assert len(mine) == 6
    for column, style in (('train_entropy_global', '-'), ('train_entropy_hyper', '--'), ('train_std_hyper', '--')):
        assert mine[tuple(row[column] for row in run(4))] == (style, [1, 2, 3, 4]), column
    assert mine[tuple(row['eval_knn'] for row in run(4) if 'eval_knn' in row)] == ('-', [1, 3])


@pytest.mark.parametrize('argv, named', (
    (['{a}', '{tmp}/none'], ('RUN', 'none', 'no summary.csv')),
    (['{a}', '{odd}'], ('RUN', 'odd', 'many')),
    (['{a}', '{a}/../a'], ('two of one name', '--names')),
    (['{a}', '--names', 'x', 'y'], ('--names', '2 names for 1 runs')),
    (['{a}'] * 9 + ['--names', *'abcdefghi'], ('9 runs', 'at most 8')),
    (['{a}', '--out', '{tmp}/c.jpg'], ('--out', '.png')),
    (['{a}', '--out', '{tmp}/no/c.png'], ('--out', 'no/c.png')),
))
def test_runs_that_cannot_be_drawn_are_refused_in_one_line(tmp_path, argv, named, capsys):
    a = write_run(tmp_path / 'a', run(2))
    odd = write_run(tmp_path / 'odd', [{'epoch': 0, 'train_loss': 'many'}])
    with pytest.raises(SystemExit) as stop:
        parser.run(main, [part.format(a=a, odd=odd, tmp=tmp_path) for part in argv])
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(message.splitlines()) == 1
    assert message.startswith('python -m timm_cgh.report: error: ')
    for name in named:
        assert name in message, message
    assert not list(tmp_path.glob('*.png')) and not list(tmp_path.glob('*.jpg'))


def test_runs_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(SystemExit):
        parser.run(main, [str(write_run(tmp_path / 'a', run(2))), '--out', str(tmp_path / 'c.png')])
    assert 'needs matplotlib' in capsys.readouterr().err
