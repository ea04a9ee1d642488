"""The start of an evaluation, and its results."""
import csv
import json

import pytest

from input_errors import refused
from timm_cgh.eval.results import describe_accuracy, write_results
from timm_cgh.eval.start import start_evaluation


@pytest.mark.parametrize('name', ['results.json', 'results.csv'])
def test_results_are_printed_and_written(name, tmp_path, capsys):
    path = tmp_path / 'made' / name
    start_evaluation(results_file=str(path))
    results = dict(model='a', top1=91.5, knn={'10': 91.5, '20': 90.0})
    write_results(results, str(path))
    printed = capsys.readouterr().out
    assert printed.startswith('--result\n') and json.loads(printed.partition('\n')[2]) == results
    with open(path, newline='') as file:
        if name.endswith('.json'):
            assert json.load(file) == results
        else:
            assert list(csv.DictReader(file)) == [dict(model='a', top1='91.5', knn_10='91.5', knn_20='90.0')]


def test_errors_complement_the_accuracies():
    assert describe_accuracy(61.53846) == dict(top1=61.5385, top1_err=38.4615)
    assert describe_accuracy(60.0, 90.0) == dict(top1=60.0, top1_err=40.0, top5=90.0, top5_err=10.0)


@pytest.mark.parametrize('arguments, parameter, part', [
    (dict(results_file='results.txt'), 'results_file', '.json or .csv'),
    (dict(output='/dev/null/here'), 'output', '/dev/null/here: cannot write'),
    (dict(device='tpu9'), 'device', ''),
])
def test_places_that_cannot_be_written_and_unknown_devices_are_refused(arguments, parameter, part):
    with refused(parameter, part):
        start_evaluation(**arguments)
