"""Run root scripts: in this process, in a process of its own, or in several under torchrun."""
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from conftest import REPOSITORY

ENV = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1')
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(
    ['torch', 'torchvision', 'timm', 'timm.optim', 'timm.scheduler', 'matplotlib.figure'])


def _main(script, args, cwd, out, err, plots):
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(cwd)
    if not plots:
        sys.modules['matplotlib.figure'] = None  # importing it raises ImportError
    sys.argv = [script, *args]
    runpy.run_path(script, run_name='__main__')


def call_script(name, *args):
    """Exit code of a script (its name without .py) that runs in this process."""
    script = importlib.import_module(name)
    return script.parser.run(script.main, [str(arg) for arg in args])


def run_torchrun(name, *args, processes=2, timeout=1200):
    """`torchrun NAME ARGS` with `ENV`: return code, stdout and stderr as `subprocess.run` gives them."""
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    return subprocess.run(
        [*launch, str(REPOSITORY / name), *map(str, args)], env=ENV, capture_output=True, text=True, timeout=timeout)


def run_script(name, *args, cwd=REPOSITORY, timeout=1200, plots=False):
    """`python NAME ARGS` in `cwd` with `ENV`: return code, stdout and stderr as `subprocess.run` gives them.

    Without the seconds that it takes to import torch and timm: a fork server has done that once, and computed nothing
    yet. Not for what depends on the start of Python itself: the environment, signals, what is done at exit. The limit
    is far above what a run takes, for the sake of busy machines. Without `plots` it does as where matplotlib is not
    installed: drawing is three quarters of a tiny run.
    """
    args = [str(arg) for arg in args]
    with mock.patch.dict(os.environ, ENV):
        forkserver.ensure_running()  # takes its environment from here, the first time
    with tempfile.TemporaryDirectory() as folder:
        out, err = (os.path.join(folder, stream) for stream in ('out', 'err'))
        process = _context.Process(target=_main, args=(str(REPOSITORY / name), args, str(cwd), out, err, plots))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([name, *args], timeout, Path(out).read_bytes(), Path(err).read_bytes())
        text = [Path(path).read_text(encoding='utf-8') for path in (out, err)]
        return subprocess.CompletedProcess([name, *args], process.exitcode, *text)
