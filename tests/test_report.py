"""The report of a run."""
import base64
import json
import re

import pytest
import yaml

import plot
from run_folders import write_run
from timm_cgh.plots.report import save_report

RESOLVED = dict(
    options=dict(model='resnet18', method='cgh', context='cross', epochs=3, data_dir='a <b> & c'), images=600,
    input_size=[3, 64, 64], processes=1, device='cpu', versions=dict(torch='2.9'), commit=None)
ROWS = [dict(epoch=0, train_loss=5.0, eval_rankme=20.0), dict(epoch=1, train_loss=4.5)]


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / 'run', ROWS)
    (folder / 'resolved.yaml').write_text(yaml.safe_dump(RESOLVED))
    return folder


def test_report_is_one_file_without_references_to_others(run):
    (run / 'curves.png').write_bytes(b'picture')
    (run / 'knn.json').write_text(json.dumps(dict(protocol='knn', dataset='birds', top1=61.504)))
    (run / 'other.json').write_text('[]')
    page = save_report(run).read_text()
    assert base64.b64encode(b'picture').decode() in page and 'RankMe</dt><dd>20.0<' in page
    assert '2 of 3 epochs on 600 images' in page and 'top1 61.50 %' in page
    assert 'a &lt;b&gt; &amp; c' in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and 'http' not in page and 'url(' not in page


def test_plot_report_writes_it_anew(run, capsys):
    assert plot.main(['report', str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / 'report.html') and (run / 'report.html').exists()


@pytest.mark.parametrize('text', ['', '[1]', 'options: [', None])
def test_other_folders_are_refused(run, text, capsys):
    (run / 'resolved.yaml').unlink()
    if text is not None:
        (run / 'resolved.yaml').write_text(text)
    with pytest.raises(SystemExit):
        plot.main(['report', str(run)])
    stderr = capsys.readouterr().err
    assert stderr.count('\n') == 1 and 'resolved.yaml: ' in stderr
