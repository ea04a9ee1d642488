"""The notebook of the documentation."""
import nbformat
import pytest
from nbclient import NotebookClient

from conftest import REPOSITORY
from script_runner import ENV

PATH = REPOSITORY / 'docs' / 'notebooks' / 'quickstart.ipynb'


def test_notebook_is_small_and_was_run_without_errors():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
    assert outputs and not any(output.output_type == 'error' for output in outputs)
    assert PATH.stat().st_size < 150_000
    assert str(REPOSITORY) not in PATH.read_text(encoding='utf-8') and '/tmp/' not in PATH.read_text(encoding='utf-8')


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(REPOSITORY))
    for name in ('OMP_NUM_THREADS', 'HF_HUB_OFFLINE'):
        monkeypatch.setenv(name, ENV[name])
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(
        notebook, timeout=1800, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}).execute()
    nbformat.write(notebook, tmp_path / PATH.name)
    assert {'photos', 'output', 'finetune', 'predictions.csv'} <= {path.name for path in tmp_path.iterdir()}
