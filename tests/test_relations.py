import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from timm_cgh.eval.relations import (
    RelationCounts, RelationTracker, Selection, count_relations, main, relation_columns, relation_curve, save_relations,
    selection_text)
from timm_cgh.task import Meter

REPOSITORY = Path(__file__).resolve().parent.parent


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


def naive(z, bank, temperature, labels, bank_labels, chosen):
    """One pair after the other; `chosen(p)` gives the selected entries of one image's distribution, float64."""
    tp = fp = fn = 0
    for row, label in zip(z.double(), labels.tolist()):
        similarities = [float(row @ entry) / temperature for entry in bank.double()]
        total = sum(math.exp(s - max(similarities)) for s in similarities)
        picked = chosen([math.exp(s - max(similarities)) / total for s in similarities])
        for entry, other in enumerate(bank_labels.tolist()):
            if label < 0 or other < 0:
                continue
            tp += entry in picked and other == label
            fp += entry in picked and other != label
            fn += entry not in picked and other == label
    return tp, fp, fn


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
    assert whole == parts[0].plus(parts[1])


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
def test_what_does_not_fit_is_refused(change, match):
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
    assert Selection.parse(str(selection)) == Selection.parse(selection_text(text)) == selection


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
    meter, sums = Meter(), {'global': RelationCounts(), 'hyper': RelationCounts()}
    for step in range(6):
        result = {'loss': torch.tensor(float(step))}
        if step % 2:  # measured now and then: batches of different classes, hence different weights
            z, bank, labels, bank_labels = case(seed=step, classes=2 + step)
            banks = {'global': Bank(bank, bank_labels), 'hyper': Bank(bank.flip(1), bank_labels)}
            result.update(tracker((z, z), labels, banks))
            for name, temperature in tracker.temperatures.items():
                counts = count_relations(z, banks[name].embeddings, temperature, labels, bank_labels, Selection(3.0))
                sums[name] = sums[name].plus(counts)
        meter.update(result)
    columns = relation_columns(meter.read())
    assert columns.pop('loss') == 2.5
    assert columns == {
        f'{kind}_{name}': pytest.approx(getattr(counts, kind), rel=1e-6)
        for name, counts in sums.items() for kind in ('recall', 'precision')}


# ---- the picture and the command


def rows(context, epochs=20, shift=0.0):
    return [
        {'epoch': e, f'train_recall_{context}': 20 + shift + e, f'train_precision_{context}': 60 - shift / 9 + e}
        for e in range(epochs)]


def write_run(folder, table, **args):
    folder.mkdir()
    names = list(dict.fromkeys(name for row in table for name in row))
    with open(folder / 'summary.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(table)
    with open(folder / 'args.yaml', 'w') as file:
        yaml.safe_dump({'context': 'cross', 'bank_size': 4096, 'track_relations': '10/K', **args}, file)
    return folder


@pytest.fixture
def runs(tmp_path):
    cgh = write_run(tmp_path / 'cgh', rows('hyper', shift=9))
    return cgh, write_run(tmp_path / 'ressl', rows('global'), context='global')


def picture(path):
    from matplotlib.image import imread
    return imread(path)


def test_the_command_draws_the_two_runs(tmp_path, runs):
    pytest.importorskip('matplotlib', reason='drawn by matplotlib')
    env = dict(os.environ, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS='1')
    out = tmp_path / 'out'
    out.mkdir()
    done = subprocess.run(
        [sys.executable, '-m', 'timm_cgh.eval.relations', *map(str, runs), '--out', str(out / 'fig2.png')],
        env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert os.listdir(out) == ['fig2.png'] and done.stdout.strip() == str(out / 'fig2.png')
    height, width = picture(out / 'fig2.png').shape[:2]
    assert width >= 1000 and height >= 400
    expected = [
        relation_curve(rows('hyper', shift=9), 'hyper', 'CGH, hypercolumn relation'),
        relation_curve(rows('global'), 'global', 'ReSSL, global relation')]
    title = "Positives that the teacher's relations select"
    save_relations(expected, tmp_path / 'direct.png', Selection(), [4096], title)
    assert (picture(out / 'fig2.png') == picture(tmp_path / 'direct.png')).all()


def test_the_picture_states_threshold_and_bank_and_has_both_panels(tmp_path, monkeypatch):
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
            (Selection(None, 7), 'the 7 bank entries')):
        assert save_relations([curve], tmp_path / 'a.png', selection, [4096, None, 512])
        assert any(words in text.get_text() for text in seen[-1].findobj(Text))
    lines = [axes.get_lines()[0].get_ydata().tolist() for axes in seen[-1].axes]
    assert lines == [[20, 21, 22], [60, 61, 62]]
    assert [axes.get_title(loc='left') for axes in seen[-1].axes] == ['Recall', 'Precision']


def test_blank_and_late_values_are_passed_over(tmp_path):
    table = [{'epoch': '0', 'train_recall_global': ''}, {'epoch': '4', 'train_recall_global': '12.5'}, {'epoch': 5}]
    curve = relation_curve(table, 'global')
    assert curve.recall == ([5], [12.5]) and curve.precision == ([], [])
    pytest.importorskip('matplotlib', reason='drawn by matplotlib')
    assert save_relations([curve], tmp_path / 'a.png', Selection())
    assert save_relations([], tmp_path / 'b.png', Selection())


def test_without_matplotlib_the_command_says_so(tmp_path, runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    check_refused([*runs, '--out', tmp_path / 'a.png'], 'pip install matplotlib', capsys)
    assert not (tmp_path / 'a.png').exists()


def check_refused(argv, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, argv)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and text in error


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, runs, capsys):
    cgh, ressl = runs
    out = tmp_path / 'fig2.png'
    untracked = write_run(tmp_path / 'untracked', [{'epoch': 0, 'train_loss': 1}], track_relations=None)
    other = write_run(tmp_path / 'other', rows('global'), context='global', track_relations='top20')
    broken = write_run(tmp_path / 'broken', [{'step': 0, 'train_recall_hyper': 1}])
    words = write_run(tmp_path / 'words', [{'epoch': 'one', 'train_recall_hyper': 1}])
    odd = write_run(tmp_path / 'odd', rows('hyper'), track_relations='ten')
    both = write_run(tmp_path / 'both', rows('global'))
    for first, second, text in (
            (tmp_path / 'none', ressl, 'holds no summary.csv'),
            (untracked, ressl, '--track-relations'),
            (ressl, cgh, 'train_recall_hyper'),
            (broken, ressl, "no column 'epoch'"),
            (words, ressl, 'RUN_CGH'),
            (odd, ressl, 'track_relations ten'),
            (cgh, both, 'was trained with --context cross, but ReSSL is --context global'),
            (cgh, other, 'threshold top20')):
        check_refused([first, second, '--out', out], text, capsys)
    check_refused([cgh, ressl, '--out', tmp_path / 'fig2.jpg'], 'must end in .png', capsys)
    check_refused([cgh, ressl, '--out', tmp_path / 'no' / 'fig2.png'], '--out', capsys)
    assert not out.exists()
