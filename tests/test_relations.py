import math
import os
import sys

import pytest
import torch
import torch.nn.functional as F

import plot
from input_errors import check_refused
from naive_relations import naive
from run_folders import write_run
from script_runner import run_script
from timm_cgh.plots import read_tracked_run, relation_curve, save_relations
from timm_cgh.task.positives import RelationCounts, RelationTracker, Selection, count_relations, relation_columns
from timm_cgh.train.meter import Meter


def case(batch=13, size=97, dim=8, classes=4, seed=0):
    """Embeddings with some class structure, a bank with a third of its entries unlabelled, images with some so."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=g)
    labels = torch.randint(classes, (batch,), generator=g)
    bank_labels = torch.randint(classes, (size,), generator=g)
    z = F.normalize(centres[labels] + torch.randn(batch, dim, generator=g), dim=1)
    bank = F.normalize(centres[bank_labels] + torch.randn(size, dim, generator=g), dim=1)
    labels[::5] = -1
    bank_labels[::3] = -1
    return z, bank, labels, bank_labels


@pytest.mark.parametrize('multiple', [1.0, 2.5, 10.0])
@pytest.mark.parametrize('temperature', [0.04, 0.08])
def test_threshold_counts_equal_a_naive_recomputation(multiple, temperature):
    z, bank, labels, bank_labels = case()
    counts = count_relations(z, bank, temperature, labels, bank_labels, Selection(multiple))

    def chosen(p):
        return {i for i, value in enumerate(p) if value >= multiple / len(bank)}

    expected = naive(z, bank, temperature, labels, bank_labels, chosen)
    assert tuple(map(int, counts)) == expected and min(expected) > 0
    tp, fp, fn = expected
    assert counts.recall == pytest.approx(100 * tp / (tp + fn))
    assert counts.precision == pytest.approx(100 * tp / (tp + fp))


@pytest.mark.parametrize('top', [1, 7, 97])
def test_top_k_counts_equal_a_naive_recomputation(top):
    z, bank, labels, bank_labels = case(seed=1)
    counts = count_relations(z, bank, 0.1, labels, bank_labels, Selection(None, top))

    def chosen(p):
        return set(sorted(range(len(p)), key=lambda i: -p[i])[:top])

    assert tuple(map(int, counts)) == naive(z, bank, 0.1, labels, bank_labels, chosen)


@pytest.mark.parametrize('selection', [Selection(), Selection(None, 20)])
def test_counts_do_not_depend_on_chunks_and_add_up_over_batches(selection):
    z, bank, labels, bank_labels = case(batch=40, size=200)
    whole = count_relations(z, bank, 0.1, labels, bank_labels, selection)
    assert whole == count_relations(z, bank, 0.1, labels, bank_labels, selection, chunk_values=1)
    assert whole == count_relations(z, bank, 0.1, labels, bank_labels, selection, chunk_values=7 * 200)
    parts = [count_relations(z[s], bank, 0.1, labels[s], bank_labels, selection) for s in (slice(9), slice(9, None))]
    assert whole == tuple(map(sum, zip(*parts)))


def test_the_distribution_is_over_the_whole_bank_but_only_labelled_entries_count():
    z = torch.eye(4)[:1]
    bank = torch.eye(4)[[0, 0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3]]
    # the two entries of the image's direction have half the mass each
    counts = count_relations(z, bank, 0.01, torch.tensor([5]), torch.tensor([-1, 5] + [5] + [6] * 9), Selection(5.0))
    assert tuple(map(int, counts)) == (1, 0, 1)
    # without the unlabelled twin in the softmax the other would have p = 1, above 7 / 12
    counts = count_relations(z, bank, 0.01, torch.tensor([5]), torch.tensor([-1, 5] + [5] + [6] * 9), Selection(7.0))
    assert tuple(map(int, counts)) == (0, 0, 2)


def test_half_precision_and_autocast_change_nothing_but_the_input():
    z, bank, labels, bank_labels = case()
    plain = count_relations(z, bank, 0.1, labels, bank_labels)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert count_relations(z, bank, 0.1, labels, bank_labels) == plain
    half = count_relations(z.half(), bank, 0.1, labels, bank_labels)
    assert half == count_relations(z.half().float(), bank, 0.1, labels, bank_labels)


def test_an_unlabelled_bank_gives_no_counts_and_no_columns():
    z, bank, labels, _ = case()
    counts = count_relations(z, bank, 0.1, labels, torch.full((len(bank),), -1))
    assert tuple(map(int, counts)) == (0, 0, 0) and math.isnan(counts.recall) and math.isnan(counts.precision)
    assert relation_columns({'loss': 1.0, 'tp_hyper': 0.0, 'fp_hyper': 0.0, 'fn_hyper': 0.0}) == {'loss': 1.0}
    assert relation_columns({'tp_global': 0.0, 'fp_global': 0.0, 'fn_global': 2.0}) == {'recall_global': 0.0}


@pytest.mark.parametrize('change, match', [
    (dict(temperature=0.0), 'temperature'),
    (dict(bank=torch.randn(97, 9)), r'\(B, D\)'),
    (dict(labels=torch.zeros(12)), 'labels'),
    (dict(bank_labels=torch.zeros(96)), 'labels'),
    (dict(selection=Selection(97.0)), 'nothing would be selected'),
    (dict(selection=Selection(None, 98)), 'more than the bank'),
])
def test_shapes_temperatures_and_selections_that_do_not_fit_are_refused(change, match):
    z, bank, labels, bank_labels = case()
    values = dict(embeddings=z, bank=bank, temperature=0.1, labels=labels, bank_labels=bank_labels)
    with pytest.raises(ValueError, match=match):
        count_relations(**{**values, **change})


@pytest.mark.parametrize('text, selection', [
    ('10/K', Selection(10.0)), ('2.5 / k', Selection(2.5)), ('.5/K', Selection(0.5)), ('top20', Selection(None, 20)),
    ('top 5', Selection(None, 5)),
])
def test_selection_is_read_from_its_short_form_and_back(text, selection):
    assert Selection.parse(text) == selection
    assert Selection.parse(str(selection)) == Selection.parse(Selection.normalize(text)) == selection


@pytest.mark.parametrize('text', ['', '10', '0/K', 'top0', 'top', '-3/K', '1e3/K', 'True', 'nan/K', '10/Km'])
def test_a_malformed_selection_is_refused(text):
    with pytest.raises(ValueError, match='10/K'):
        Selection.parse(text)


class Bank(torch.nn.Module):
    def __init__(self, embeddings, labels):
        super().__init__()
        self.embeddings, self.labels = embeddings, labels


def test_an_epochs_columns_are_ratios_of_sums_over_its_measured_steps():
    tracker = RelationTracker(Selection(3.0), {'global': 0.1, 'hyper': 0.2})
    meter, measured = Meter(), {'global': [], 'hyper': []}
    for step in range(6):
        result = {'loss': torch.tensor(float(step))}
        if step % 2:  # measured now and then: batches of different classes, hence different weights
            z, bank, labels, bank_labels = case(seed=step, classes=2 + step)
            banks = {'global': Bank(bank, bank_labels), 'hyper': Bank(bank.flip(1), bank_labels)}
            result.update(tracker((z, z), labels, banks))
            for name, temperature in tracker.temperatures.items():
                counts = count_relations(z, banks[name].embeddings, temperature, labels, bank_labels, Selection(3.0))
                measured[name].append(counts)
        meter.update(result)
    columns = relation_columns(meter.read())
    assert columns.pop('loss') == 2.5
    sums = {name: RelationCounts(*map(sum, zip(*counts))) for name, counts in measured.items()}
    assert columns == {
        f'{kind}_{name}': pytest.approx(getattr(counts, kind), rel=1e-6)
        for name, counts in sums.items() for kind in ('recall', 'precision')}


# ---- the plot and the command


def rows(context, epochs=20, shift=0.0):
    return [
        {'epoch': e, f'train_recall_{context}': 20 + shift + e, f'train_precision_{context}': 60 - shift / 9 + e}
        for e in range(epochs)]


def write_tracked(folder, table, **args):
    return write_run(folder, table, **{'context': 'cross', 'bank_size': 4096, 'track_relations': '10/K', **args})


@pytest.fixture
def runs(tmp_path):
    cgh = write_tracked(tmp_path / 'cgh', rows('hyper', shift=9))
    return cgh, write_tracked(tmp_path / 'ressl', rows('global'), context='global')


def test_the_command_draws_the_two_runs(tmp_path, runs):
    imread = pytest.importorskip('matplotlib.image').imread
    out = tmp_path / 'out' / 'fig2.png'
    out.parent.mkdir()
    done = run_script('plot.py', 'relations', *runs, '--out', out, plots=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert os.listdir(out.parent) == ['fig2.png'] and done.stdout.strip() == str(out)
    height, width = imread(out).shape[:2]
    assert width >= 1000 and height >= 400
    expected = [
        relation_curve(rows('hyper', shift=9), 'hyper', 'CGH, hypercolumn relation'),
        relation_curve(rows('global'), 'global', 'ReSSL, global relation')]
    title = "Positives that the teacher's relations select"
    save_relations(expected, tmp_path / 'direct.png', Selection(), [4096], title)
    assert (imread(out) == imread(tmp_path / 'direct.png')).all()


def test_the_size_of_a_default_bank_is_that_which_the_run_had(tmp_path):
    folder = write_tracked(tmp_path / 'run', rows('hyper'), bank_size=None)
    assert read_tracked_run(folder, 'cross').bank_size is None
    (folder / 'resolved.yaml').write_text('options: {bank_size: 256}')
    assert read_tracked_run(folder, 'cross').bank_size == 256


def test_the_plot_states_threshold_and_bank_and_has_both_panels(tmp_path, monkeypatch):
    pytest.importorskip('matplotlib', reason='drawn by matplotlib')
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    seen = []
    save = Figure.savefig

    def savefig(self, *args, **kwargs):
        seen.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', savefig)
    curve = relation_curve(rows('hyper', 3), 'hyper')
    assert curve.label == 'hypercolumn' and curve.recall == ([1, 2, 3], [20, 21, 22])
    for selection, words in (
            (Selection(2.5), '2.5 / K (K = 4096 and 512)'),
            (Selection(None, 7), "the teacher's 7 most probable bank entries")):
        assert save_relations([curve], tmp_path / 'a.png', selection, [4096, None, 512])
        assert any(words in text.get_text() for text in seen[-1].findobj(Text))
    lines = [axes.get_lines()[0].get_ydata().tolist() for axes in seen[-1].axes]
    assert lines == [[20, 21, 22], [60, 61, 62]]
    assert [axes.get_title(loc='left') for axes in seen[-1].axes] == ['Recall', 'Precision']


def test_blank_and_late_values_are_skipped(tmp_path):
    table = [{'epoch': '0', 'train_recall_global': ''}, {'epoch': '4', 'train_recall_global': '12.5'}, {'epoch': 5}]
    curve = relation_curve(table, 'global')
    assert curve.recall == ([5], [12.5]) and curve.precision == ([], [])
    pytest.importorskip('matplotlib', reason='drawn by matplotlib')
    assert save_relations([curve], tmp_path / 'a.png', Selection())
    assert save_relations([], tmp_path / 'b.png', Selection())


def test_without_matplotlib_the_command_names_the_package(tmp_path, runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    check_refused(capsys, plot, ['relations', *runs, '--out', tmp_path / 'a.png'], 'pip install matplotlib')
    assert not (tmp_path / 'a.png').exists()


def test_runs_that_cannot_be_compared_are_refused_in_one_line(tmp_path, runs, capsys):
    cgh, ressl = runs
    out = tmp_path / 'fig2.png'
    untracked = write_tracked(tmp_path / 'untracked', [{'epoch': 0, 'train_loss': 1}], track_relations=None)
    other = write_tracked(tmp_path / 'other', rows('global'), context='global', track_relations='top20')
    broken = write_tracked(tmp_path / 'broken', [{'step': 0, 'train_recall_hyper': 1}])
    words = write_tracked(tmp_path / 'words', [{'epoch': 'one', 'train_recall_hyper': 1}])
    odd = write_tracked(tmp_path / 'odd', rows('hyper'), track_relations='ten')
    both = write_tracked(tmp_path / 'both', rows('global'))
    for first, second, text in (
            (tmp_path / 'none', ressl, 'args.yaml'),
            (untracked, ressl, f'RUN_CGH {untracked}: its summary.csv has no train_recall_hyper'),
            (ressl, cgh, f'RUN_CGH {ressl}: trained with context global, must be cross'),
            (broken, ressl, f'{broken}/summary.csv: row 1 is damaged'),
            (words, ressl, f'{words}/summary.csv: row 1 is damaged'),
            (odd, ressl, f'{odd}/args.yaml: track_relations=ten: must be'),
            (cgh, both, f'RUN_RESSL {both}: trained with context cross, must be global'),
            (cgh, other, f'RUN_RESSL {other}: measured with the threshold top20, but RUN_CGH with 10/K')):
        assert check_refused(capsys, plot, ['relations', first, second, '--out', out], text).count('\n') == 1
    check_refused(capsys, plot, ['relations', cgh, ressl, '--out', tmp_path / 'fig2.jpg'], 'must end in .png')
    check_refused(capsys, plot, ['relations', cgh, ressl, '--out', tmp_path / 'no' / 'fig2.png'], '--out ')
    assert not out.exists()
