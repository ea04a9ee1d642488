"""compare.py: methods side by side."""
import json
import os
import shlex
import signal
import threading
import time

import pytest
import yaml

import compare as script
import train
from input_errors import check_refused
from run_folders import read_table as table
from script_runner import run_script
from timm_cgh.plots import Run, save_chart, save_tables, summarise
from timm_cgh.train.settings import check_method

DIGITS = ['--dataset', 'digits', '--model', 'test_resnet', '--img-size', 16, '--in-chans', 1, '--mean', 0.3,
          '--std', 0.37, '--batch-size', 128, '--hidden-dim', 32, '--embed-dim', 16, '--bank-size', 256,
          '--epochs', 1, '--workers', 0, '--knn-interval', 0, '--device', 'cpu']


def compare(*args):
    return run_script('compare.py', *args, timeout=3600)  # up to five scripts, each of which imports torch anew


def test_means_and_deviations_are_taken_over_the_seeds_of_a_method():
    runs = [Run('b', 1, 40.0, 50.0, 100.0, 900.0), Run('a', 1, 10.0, 20.0), Run('b', 2, 44.0, 53.0, 110.0, 900.0)]
    first, second = summarise(runs)
    assert (first['method'], first['seeds'], first['knn'], first['linear']) == ('b', 2, 42.0, 51.5)
    assert first['knn_std'] == pytest.approx(8 ** 0.5) and first['peak_memory_mib_std'] == 0
    assert (second['method'], second['seeds'], second['knn_std'], second['images_per_s']) == ('a', 1, None, None)


def test_tables_and_chart_hold_what_was_measured(tmp_path):
    runs = [Run('random weights', 1, 10.0, 20.0), Run('CGH', 1, 40.0, 50.0, 100.0, 900.0, 'python train.py')]
    save_tables(runs, tmp_path)
    assert '| CGH | 1 | 40.00 | 50.00 | 100 | 900 |' in (tmp_path / 'compare.md').read_text().splitlines()
    assert [row['linear'] for row in table(tmp_path / 'compare.csv')] == ['20.0', '50.0']
    assert table(tmp_path / 'runs.csv')[1]['command'] == 'python train.py'
    assert save_chart(runs, tmp_path / 'compare.png') and (tmp_path / 'compare.png').stat().st_size > 5000


@pytest.mark.parametrize('given,batch,wanted', [
    ([], 128, dict(cross=1, moco=8, simclr=1)),
    ([], 12, dict(cross=1, moco=4)),
    (['--bn-splits', 2], 128, dict(cross=2, moco=2, simclr=1)),
])
def test_moco_splits_the_batch_statistics_and_other_methods_keep_their_options(given, batch, wanted):
    options = [str(option) for option in (*DIGITS, '--batch-size', batch, *given)]
    args = train.parser.parse(options)
    for name, splits in wanted.items():
        method = train.parser.parse(script.method_options(name, args, options))
        assert method.bn_splits == splits
        check_method(method)


def test_a_run_is_trained_once_its_export_is_of_the_last_epoch(tmp_path, monkeypatch):
    options = [str(option) for option in (*DIGITS, '--epochs', 2, '--data-dir', 'https://me:secret@host/a b')]
    args = train.parser.parse(options)
    args.output, called = str(tmp_path), []
    monkeypatch.setattr(script, 'call', lambda name, *_: called.append(name) or export(args.epochs) or trains)
    monkeypatch.setattr(script, 'evaluate', lambda *_: (40.0, 50.0))
    folder = tmp_path / 'runs' / 'cross-42'
    (folder / 'export').mkdir(parents=True)
    (folder / 'summary.csv').write_text('epoch,train_images_per_s\n0,10\n1,20\n')

    def export(epochs):
        (folder / 'export' / 'config.json').write_text(json.dumps(dict(
            architecture='test_resnet', pretrained_cfg=dict(tag=f'cgh_{epochs}ep'))))

    for epochs, trains in ((1, False), (2, False), (12, True)):
        export(epochs)
        (folder / 'knn.json').touch()
        run = script.run_method(args, 'cross', options)
        assert called == ([] if epochs == 2 else ['train.py'])
        assert (folder / 'knn.json').exists() == (epochs == 2)  # that of another epoch goes
        called.clear()
        assert (run is not None) == (epochs == 2 or trains)
        if run is not None:
            command = shlex.split(run.command)
            assert run.method == 'CGH, cross-context'
            assert command[:2] == ['python', 'train.py'] and 'https://***@host/a b' in command


def test_a_login_is_kept_nowhere(tmp_path):
    args = train.parser.parse(['--data-dir', 'https://me:secret@host/'])
    args.output = str(tmp_path)
    for _ in range(2):
        script.open_output(script.parser.parse_args([]), args)
    assert 'https://***@host/' in (tmp_path / 'args.yaml').read_text()


def test_a_script_that_says_nothing_before_it_fails_is_named(tmp_path, caplog):
    (tmp_path / 'child.py').write_text('raise SystemExit(3)')
    assert not script.call(str(tmp_path / 'child.py'), [], str(tmp_path / 'log')) and 'exit code 3' in caplog.text


@pytest.mark.slow
def test_an_interrupted_comparison_on_digits_does_only_what_is_missing(tmp_path):
    done = compare(*DIGITS, '--methods', 'simclr', '--output', tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(tmp_path / 'compare.csv')
    assert [row['method'] for row in rows] == ['random weights', 'SimCLR']
    for row, name in zip(rows, ('untrained', 'simclr')):
        folder = tmp_path / 'runs' / f'{name}-42'
        found = [json.loads((folder / f'{what}.json').read_text()) for what in ('knn', 'linear')]
        assert [float(row['knn']), float(row['linear'])] == [results['top1'] for results in found]
        assert found[0]['val_images'] == found[1]['val_images'] == 364
    assert float(rows[1]['images_per_s']) > 0 and '| SimCLR | 1 |' in done.stdout
    # stopped in the middle and started again: only what is not there is done
    summary, linear = (tmp_path / 'runs' / 'simclr-42' / name for name in ('summary.csv', 'linear.json'))
    before = summary.stat().st_mtime_ns
    linear.unlink()
    done = compare(*DIGITS, '--methods', 'simclr', '--output', tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert linear.exists() and summary.stat().st_mtime_ns == before and table(tmp_path / 'compare.csv') == rows


@pytest.mark.parametrize('options, named', (
    (['--methods', 'mocov9'], 'mocov9'),
    (['--epochs', '0'], '--epochs'),
    (['--methods', 'cross', 'simclr', '--predictor'], '--predictor: has no meaning for the method simclr'),
))
def test_bad_options_are_refused_before_any_run(tmp_path, capsys, options, named):
    stderr = check_refused(capsys, script, [*DIGITS, *options, '--output', tmp_path / 'out'], named)
    assert stderr.count('\n') == 1 and not (tmp_path / 'out').exists()


def test_a_folder_with_other_settings_is_refused_before_any_run(tmp_path, capsys):
    args = vars(train.parser.parse([str(option) for option in DIGITS]))
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({'train': {**args, 'val_split': 'validation', 'epochs': 77}}))
    named = f'--output {tmp_path}: holds a comparison with epochs 77, not '
    check_refused(capsys, script, [*DIGITS, '--methods', 'cross', '--output', tmp_path], named)
    assert not (tmp_path / 'runs').exists()
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({'train': {**args, 'decay_rate': 0.1}}))  # of older versions
    options = [str(option) for option in (*DIGITS, '--output', tmp_path)]
    script.open_output(script.parser.parse_known_args(options)[0], train.parser.parse(options))


CHILD = """
import os, signal, sys, time
def save(*_):
    open(sys.argv[1] + '/saved', 'w').close()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1] + '/started', 'w').close()
time.sleep(600)
"""


def test_a_signal_ends_the_script_that_runs_once_it_has_saved_its_state(tmp_path):
    (tmp_path / 'child.py').write_text(CHILD)
    before = signal.signal(signal.SIGTERM, script.end)

    def send():
        while not (tmp_path / 'started').exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        with pytest.raises(SystemExit) as stopped:
            script.call(str(tmp_path / 'child.py'), [str(tmp_path)], str(tmp_path / 'log'))
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 128 + signal.SIGTERM and (tmp_path / 'saved').exists()


@pytest.mark.slow  # four processes
def test_a_method_that_fails_is_named_and_the_others_go_on(tmp_path):
    done = compare(*DIGITS, '--methods', 'global', '--track-relations', 'top999', '--output', tmp_path)
    assert done.returncode == 1 and 'Failed: global-42' in done.stderr and 'top999' in done.stderr
    assert [row['method'] for row in table(tmp_path / 'compare.csv')] == ['random weights']
