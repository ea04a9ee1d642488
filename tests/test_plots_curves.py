import math
import os
import sys

import pytest

import plot
from input_errors import check_refused
from run_folders import write_run
from timm_cgh.plots import save_curves

matplotlib = pytest.importorskip('matplotlib', reason='curves are drawn by matplotlib')
imread = pytest.importorskip('matplotlib.image').imread


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


def test_curves_are_a_png_of_readable_size(tmp_path):
    levels = {'untrained': 34., 'raw pixels': 39.}
    assert save_curves(run(30), tmp_path / 'curves.png', title='a run', knn_levels=levels)
    height, width = imread(tmp_path / 'curves.png').shape[:2]
    assert width >= 1000 and height >= 600
    assert os.listdir(tmp_path) == ['curves.png']


def test_every_panel_shows_its_columns(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    drawn, draw = [], Axes.plot
    monkeypatch.setattr(Axes, 'plot', lambda axes, x, y, **style: drawn.append(y) or draw(axes, x, y, **style))
    save_curves(run(6), tmp_path / 'all.png')
    for column in run(6)[0].keys() - {'epoch'}:
        assert [row[column] for row in run(6) if column in row] in drawn, column


@pytest.mark.parametrize('columns', [('lr',), ('lr', 'train_loss'), ('lr', 'train_loss', 'eval_knn')])
def test_the_lowest_panel_of_each_column_has_the_axis_of_the_epochs(tmp_path, monkeypatch, columns):
    from matplotlib.figure import Figure
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kw: figures.append(self) or save(self, *args, **kw))
    save_curves([{name: row.get(name) for name in ('epoch', *columns)} for row in run(6)], tmp_path / 'curves.png')
    panels = {axes.get_subplotspec().num1: axes for axes in figures[0].axes if axes.get_visible()}
    assert len(panels) == len(columns)
    for place, axes in panels.items():
        lowest = place + 2 not in panels
        assert bool(axes.get_xlabel()) == axes.xaxis.get_tick_params()['labelbottom'] == lowest


def test_rows_read_back_from_csv_give_the_same_picture(tmp_path):
    columns = {name for row in run(6) for name in row}
    text = [{name: str(row.get(name, '')) for name in columns} for row in run(6)]
    save_curves(run(6), tmp_path / 'numbers.png')
    save_curves(text, tmp_path / 'text.png')
    assert (imread(tmp_path / 'numbers.png') == imread(tmp_path / 'text.png')).all()


@pytest.mark.parametrize('rows', (
    [],
    run(1),
    [{'epoch': 0}],
    [{'epoch': 0, 'train_loss': float('nan'), 'eval_knn': None, 'lr': ''}, {'epoch': 1, 'train_loss': float('inf')}],
    [{'epoch': 5, 'train_loss_gg': 1.0}, {'epoch': 7, 'train_loss_gg': 2.0}],
))
def test_runs_with_little_to_show_still_give_a_picture(rows, tmp_path):
    assert save_curves(rows, tmp_path / 'curves.png')
    assert imread(tmp_path / 'curves.png').size


def test_drawing_leaves_pyplot_and_the_callers_style_alone(tmp_path):
    def state():
        return 'matplotlib.pyplot' in sys.modules, matplotlib.rcParams['axes.grid'], matplotlib.rcParams['figure.dpi']
    before = state()
    save_curves(run(3), tmp_path / 'curves.png')
    assert state() == before


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert save_curves(run(3), tmp_path / 'curves.png') is False
    assert not os.listdir(tmp_path)


# ---- several runs


def drawn_lines(monkeypatch):
    """Calls of `Axes.plot` from now on, as (colour, style, x, y)."""
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
    options = ['--names', 'CGH', 'MoCo-v2', '--title', 'two', '--out', str(tmp_path / 'two.png')]
    assert plot.main(['runs', *map(str, runs), *options]) == 0
    assert imread(tmp_path / 'two.png').shape[1] >= 1000
    cgh, moco = dict.fromkeys(color for color, *_ in lines)
    of_moco = [(style, y) for color, style, _, y in lines if color == moco]
    assert of_moco == [('solid', [8.0, 7.0, 6.0]), ('solid', [0.5] * 3)]
    mine = {tuple(y): (style, x) for color, style, x, y in lines if color == cgh}
    assert len(mine) == 6
    for name, style in (('entropy_global', 'solid'), ('entropy_hyper', 'dashed'), ('std_hyper', 'dashed')):
        assert mine[tuple(row[f'train_{name}'] for row in run(4))] == (style, [1, 2, 3, 4]), name
    assert mine[tuple(row['eval_knn'] for row in run(4) if 'eval_knn' in row)] == ('solid', [1, 3])


@pytest.mark.parametrize('argv, named', (
    (['{a}', '{tmp}/none'], ('RUN {tmp}/none: ', 'no summary.csv')),
    (['{a}', '{odd}'], ('odd/summary.csv: row 1 is damaged',)),
    (['{a}', '{a}/../a'], ('several of one name', '--names')),
    (['{a}', '--names', 'x', 'y'], ('--names x y: 2 names for 1 runs',)),
    (['{a}'] * 9 + ['--names', *'abcdefghi'], ('RUN: 9 runs, at most 8',)),
    (['{a}', '--out', '{tmp}/c.jpg'], ('--out {tmp}/c.jpg: ', '.png')),
    (['{a}', '--out', '{tmp}/no/c.png'], ('--out {tmp}/no/c.png: ',)),
))
def test_runs_that_cannot_be_drawn_are_refused_in_one_line(tmp_path, argv, named, capsys):
    a = write_run(tmp_path / 'a', run(2))
    odd = write_run(tmp_path / 'odd', [{'epoch': 0, 'train_loss': 'many'}])
    argv, named = ([part.format(a=a, odd=odd, tmp=tmp_path) for part in parts] for parts in (argv, named))
    assert check_refused(capsys, plot, ['runs', *argv], *named).count('\n') == 1
    assert not list(tmp_path.glob('*.png')) and not list(tmp_path.glob('*.jpg'))


def test_without_matplotlib_the_command_names_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    argv = ['runs', write_run(tmp_path / 'a', run(2)), '--out', tmp_path / 'c.png']
    check_refused(capsys, plot, argv, '--out', 'needs matplotlib')
    assert not (tmp_path / 'c.png').exists()
