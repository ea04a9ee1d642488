"""Two gloo processes on one machine."""
import importlib
import inspect

import pytest
import torch

from script_runner import run_script


def run(out, processes, *args):
    done = run_script('tests/distributed_worker.py', out, *args, processes=processes)
    assert done.returncode == 0, done.stderr
    return [torch.load(f'{out}-{processes}-{rank}.pt', weights_only=True) for rank in range(processes)]


def check_ranks_agree(first, second, buffers=True):
    for part in ('student', 'teacher', 'banks', 'labels'):
        for name, value in first[part].items():
            if torch.is_tensor(value) and (buffers or 'running' not in name):
                assert torch.equal(value, second[part][name]), f'{part} {name}'


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """State of a single process; without batch norm, ShuffleBN changes nothing there."""
    return run(tmp_path_factory.mktemp('one') / 'run', 1, 'convnext_atto', 'plain', 12)[0]


@pytest.mark.parametrize('mode', ['plain', 'shuffle'])
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path, mode, one):
    two = run(tmp_path / 'run', 2, 'convnext_atto', mode, 12)
    check_ranks_agree(*two)
    # rank 0's start is the single process's: prepare_distributed made it everyone's
    torch.testing.assert_close(torch.tensor(two[0]['losses']), torch.tensor(one['losses']), rtol=1e-4, atol=1e-4)
    for name, bank in one['banks'].items():
        torch.testing.assert_close(two[0]['banks'][name], bank, rtol=1e-3, atol=1e-3)
        assert torch.equal(two[0]['labels'][name], one['labels'][name]) and (one['labels'][name] >= 0).all()
    assert two[0]['relations'] == two[1]['relations'] and 'precision_hyper' in one['relations']
    for name, value in one['relations'].items():
        if name.startswith(('recall', 'precision')):  # a pair at the threshold may fall on either side
            assert two[0]['relations'][name] == pytest.approx(value, abs=0.5), name


def test_batch_norm_network_stays_equal_on_both_processes(tmp_path):
    check_ranks_agree(*run(tmp_path / 'run', 2, 'resnet10t', 'norms', 5), buffers=False)


@pytest.mark.parametrize('script, work', [
    ('embed', 'join_parts'), ('eval_detection', 'write_files'), ('eval_knn', 'save_features'),
    ('eval_linear', 'report'), ('eval_semisup', 'report'), ('finetune', 'report'), ('neighbours', 'find_neighbours'),
    ('predict', 'write_predictions'), ('write_shards', 'write_shards')])
def test_no_process_waits_for_what_rank_0_does_alone_in_the_end(script, work):
    main = inspect.getsource(importlib.import_module(script).main)
    assert main.rindex('end_process(process)') < main.index(f'{work}(')
