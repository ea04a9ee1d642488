"""Run root scripts: in this process, in one or several of their own."""
import importlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

import pytest

from conftest import REPOSITORY

ENV = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1')
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(
    ['torch', 'torchvision', 'timm', 'timm.optim', 'timm.scheduler', 'matplotlib.figure'])


def _main(script, args, cwd, out, err, plots, env):
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.environ.update(env)
    os.chdir(cwd)
    if not plots:
        sys.modules['matplotlib.figure'] = None  # importing it raises ImportError
    sys.argv = [script, *args]
    runpy.run_path(script, run_name='__main__')


def call_script(name, *args, plots=False):
    """Exit code of a script (its name without .py) that runs in this process; for `plots` see `run_script`."""
    script = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        if not plots:
            patch.setitem(sys.modules, 'matplotlib.figure', None)
        return script.parser.run(script.main, [str(arg) for arg in args])


def run_script(name, *args, cwd=REPOSITORY, timeout=1200, plots=False, processes=1):
    """`python NAME ARGS` in `cwd` with `ENV`: return code, stdout and stderr as `subprocess.run` gives them.

    Without the seconds that it takes to import torch and timm: a fork server has done that once, and computed nothing
    yet. Not for what depends on the start of Python itself: the environment, signals, what is done at exit. The limit
    is far above what a run takes, for the sake of busy machines. Without `plots` it does as where matplotlib is not
    installed: drawing is three quarters of a tiny run. Several `processes` get the variables that torchrun sets, and
    end when one of them fails; `cwd` may be a list, a folder for each.
    """
    args = [str(arg) for arg in args]
    with mock.patch.dict(os.environ, ENV):
        forkserver.ensure_running()  # takes its environment from here, the first time
    with tempfile.TemporaryDirectory() as folder:
        out, err = (os.path.join(folder, stream) for stream in ('out', 'err'))
        running = [
            _context.Process(target=_main, args=(str(REPOSITORY / name), args, str(place), out, err, plots, env))
            for place, env in zip(cwd if isinstance(cwd, list) else [cwd] * processes, _torchrun_variables(processes))]
        for process in running:
            process.start()
        end, codes = time.monotonic() + timeout, [None]
        while None in codes and not any(codes) and time.monotonic() < end:
            connection.wait([process.sentinel for process in running if process.exitcode is None], 1)
            codes = [process.exitcode for process in running]
        for process in running:
            process.kill()
            process.join()
        if None in codes and not any(codes):
            raise subprocess.TimeoutExpired([name, *args], timeout, Path(out).read_bytes(), Path(err).read_bytes())
        text = [Path(path).read_text(encoding='utf-8') for path in (out, err)]
        return subprocess.CompletedProcess([name, *args], next(filter(None, codes), 0), *text)


def run_two_processes(name, *args):
    """`torchrun --nproc_per_node 2 NAME ARGS`, by `run_script`."""
    return run_script(name, *args, processes=2)


def _torchrun_variables(processes):
    if processes == 1:
        return [{}]
    with socket.create_server(('localhost', 0)) as server:
        port = str(server.getsockname()[1])
    return [
        dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
             MASTER_ADDR='localhost', MASTER_PORT=port)
        for rank in range(processes)]
