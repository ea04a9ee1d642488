"""Labels in the banks and `train.py --track-relations`."""
import copy

import pytest
import torch
import yaml

import train as script
from data_files import write_images
from input_errors import check_refused
from naive_relations import naive
from run_folders import read_table
from script_runner import run_script
from timm_cgh import MemoryBank, create_task
from timm_cgh.task.positives import RelationTracker, Selection

SMALL = dict(bank_size=20, hidden_dim=32, embed_dim=16)


@pytest.mark.parametrize('batches', [[3, 3, 3, 3], [7, 1, 0, 9], [12, 25, 4]])
def test_labels_stay_beside_their_embeddings_around_the_wrap(batches):
    bank, count = MemoryBank(7, 2, labels=True), 0
    assert bank.labels.tolist() == [-1] * 7
    for batch in batches:
        label = torch.arange(count, count + batch)
        bank.enqueue(torch.stack([label, -label], dim=1).float(), label)
        filled = bank.labels >= 0
        assert torch.equal(bank.embeddings[filled, 0].long(), bank.labels[filled])
        count += batch
        assert filled.sum() == min(count, 7) and sorted(bank.labels[filled].tolist()) == list(range(count))[-7:]
    bank.enqueue(torch.zeros(2, 2))
    assert (bank.labels == -1).sum() == 2  # no labels given: unknown
    with pytest.raises(ValueError, match='labels'):
        bank.enqueue(torch.zeros(2, 2), torch.zeros(3))


def test_states_pass_between_banks_with_and_without_labels():
    with_labels, plain = MemoryBank(5, 2, labels=True), MemoryBank(5, 2)
    assert plain.labels is None and set(plain.state_dict()) == {'embeddings', '_extra_state'}
    with_labels.enqueue(torch.ones(3, 2), torch.arange(3))
    other = MemoryBank(5, 2, labels=True)
    other.load_state_dict(with_labels.state_dict())
    assert torch.equal(other.labels, with_labels.labels)
    banks = torch.nn.ModuleDict({'global': plain})
    banks.load_state_dict(torch.nn.ModuleDict({'global': with_labels}).state_dict())
    assert plain.position == 3 and torch.equal(plain.embeddings, with_labels.embeddings)
    other.load_state_dict(plain.state_dict())
    assert other.labels.tolist() == [-1] * 5


@pytest.mark.parametrize('context', ['cross', 'global'])
def test_a_step_measures_the_banks_as_they_are_before_it(context):
    torch.manual_seed(0)
    task = create_task('resnet10t', context=context, bank_labels=True, **SMALL)
    temps = {'global': task.loss.temp_teacher, 'hyper': task.loss.temp_hyper_teacher}
    tracker = RelationTracker(Selection(1.5), temps)
    for step in range(4):
        views, target = [torch.randn(6, 3, 32, 32) for _ in range(2)], torch.tensor([0, 1, 0, 1, 2, -1])
        before = copy.deepcopy(task)
        result = task(views, target, observe=tracker)
        with torch.no_grad():
            contexts = before.teacher(views[0])
        for (name, bank), z in zip(before.banks.items(), contexts):
            def chosen(p):
                return {i for i, value in enumerate(p) if value >= 1.5 / 20}
            expected = naive(z, bank.embeddings, temps[name], target, bank.labels, chosen)
            assert tuple(int(result[f'{kind}_{name}']) for kind in ('tp', 'fp', 'fn')) == expected
            assert torch.equal(task.banks[name].labels[6 * step:][:6], target[:20 - 6 * step])
    assert ('tp_hyper' in result) == (context == 'cross') and sum(expected) > 0


def test_tracking_does_not_change_training_and_costs_nothing_when_off():
    losses = []
    for labels in (False, True):
        torch.manual_seed(0)
        task = create_task('resnet10t', bank_labels=labels, **SMALL)
        views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
        tracker = RelationTracker(Selection(2.0), {'global': 0.04, 'hyper': 0.08}) if labels else None
        result = task(views, torch.arange(4), observe=tracker)
        losses.append(result['loss'])
        assert ('tp_global' in result) == labels and any('labels' in key for key in task.state_dict()) == labels
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match='no target'):
        task(views)


TINY = ['--dataset', 'digits', '--model', 'test_resnet', '--img-size', 16, '--in-chans', 1, '--hflip', 0,
        '--batch-size', 128, '--hidden-dim', 32, '--embed-dim', 16, '--epochs', 3, '--workers', 0, '--knn-interval', 0,
        '--log-interval', 4]


@pytest.mark.slow
def test_two_runs_on_digits_give_the_comparison(tmp_path):
    pytest.importorskip('matplotlib', reason='drawn by matplotlib')
    for name, options in (('cgh', ()), ('ressl', ('--context', 'global'))):
        args = ['--output', tmp_path, '--experiment', name, '--track-relations', *options]
        done = run_script('train.py', *TINY, *args, plots=True)
        assert done.returncode == 0, done.stderr
        rows = read_table(tmp_path / name / 'summary.csv')
        columns = {key for key in rows[0] if 'recall' in key or 'precision' in key}
        contexts = ('global',) if options else ('global', 'hyper')
        assert columns == {f'train_{kind}_{context}' for kind in ('recall', 'precision') for context in contexts}
        assert all(0 <= float(row[column]) <= 100 for row in rows for column in columns)
        assert not any('tp_' in key for key in rows[0])
        assert (tmp_path / name / 'relations.png').exists()
        assert yaml.safe_load((tmp_path / name / 'args.yaml').read_text())['track_relations'] == '10/K'
    out = tmp_path / 'fig2.png'
    done = run_script('plot.py', 'relations', tmp_path / 'cgh', tmp_path / 'ressl', '--out', out, plots=True)
    assert done.returncode == 0 and out.exists(), done.stderr


@pytest.mark.parametrize('options, text', [
    (['--track-relations', 'ten'], '10/K'),
    (['--track-relations', '--bank-size', '8'], 'nothing would be selected'),
])
def test_bad_thresholds_are_refused_before_the_run_begins(tmp_path, capsys, options, text):
    check_refused(capsys, script, [*TINY, '--output', tmp_path, '--experiment', 'run', *options], text)
    assert not (tmp_path / 'run').exists()


def test_tracking_of_unlabelled_images_is_refused(tmp_path, capsys):
    images = write_images(tmp_path / 'images', 4, mode='L')
    argv = [*TINY[2:], '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--track-relations']
    check_refused(capsys, script, argv, '--track-relations: needs')
    assert not (tmp_path / 'run').exists()
