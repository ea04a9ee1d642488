"""Signals that ask a run to end."""
import io
import logging
import os
import re
import signal
import subprocess
import threading
import time

import pytest
import torch

from conftest import REPOSITORY
from script_runner import ENV
from timm_cgh.train.stop import StopRequest
from training import TINY, check_equal_checkpoints, check_ok, command, make_images, train


@pytest.mark.parametrize('signum', [
    signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGHUP))])
def test_a_signal_saves_and_ends_cleanly_and_the_run_goes_on(tmp_path, signum):
    args = [*TINY, '--data-dir', make_images(tmp_path / 'images', 400), '--epochs', 2, '--log-interval', 1,
            '--knn-interval', 0, '--resume', 'auto', '--output', tmp_path]
    process = subprocess.Popen(command(*args, '--experiment', 'run', '--workers', 1), env=ENV, cwd=REPOSITORY,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if 'epoch 1 [5/' in line:
            os.killpg(process.pid, signum)  # data workers included, as a terminal and a scheduler do it
            if signum == signal.SIGTERM:
                os.killpg(process.pid, signum)  # and torchrun relays it
            break
    lines.extend(process.stdout)
    text = ''.join(lines)
    assert process.wait(60) == 128 + signum, text
    assert f'Stopped by {signum.name}' in text and 'Traceback' not in text
    assert list((tmp_path / 'run').glob('recovery-1-*.pth.tar'))
    text = check_ok(train(*args, '--experiment', 'run'))
    assert re.search(r'Resumed .*recovery-1-\d+\.pth\.tar at epoch 1, batch \d+', text)
    check_ok(train(*args, '--experiment', 'whole'))
    check_equal_checkpoints(tmp_path / 'whole', tmp_path / 'run')


@pytest.mark.parametrize('signum', [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_before_training_ends_in_one_line(tmp_path, signum):
    process = subprocess.Popen(
        command(*TINY, '--dataset', 'digits', '--in-chans', 1, '--epochs', 4, '--output', tmp_path), env=ENV,
        cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if 'batches of' in line:  # the first kNN evaluation follows
            os.killpg(process.pid, signum)
    assert process.wait(60) == 128 + signum
    assert lines[-1] == f'Stopped by {signum.name} before training began\n' and 'Traceback' not in ''.join(lines)


def test_a_signal_while_a_log_line_is_written_is_logged_whole(capsys):
    class Pipe(io.RawIOBase):
        text = ''

        def writable(self):
            return True

        def write(self, data):
            if not self.text:
                self.text = 'interrupted: '
                os.kill(os.getpid(), signal.SIGINT)
            self.text += bytes(data).decode()
            return len(data)

    pipe, logger = Pipe(), logging.getLogger('train')
    handler = logging.StreamHandler(io.TextIOWrapper(io.BufferedWriter(pipe)))
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(SystemExit) as stopped, StopRequest():
            logger.info('a line')
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert stopped.value.code == 128 + signal.SIGINT
    assert 'Stopped by SIGINT before training began' in pipe.text
    assert 'Logging error' not in capsys.readouterr().err


def test_a_signal_during_the_exchange_among_processes_is_not_lost(monkeypatch):
    request = StopRequest()
    request.defer()

    def all_reduce(flag, op):
        request._on_signal(signal.SIGTERM, None)

    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'all_reduce', all_reduce)
    assert not request.agreed(torch.device('cpu'))
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda flag, op: None)
    assert request.agreed(torch.device('cpu')) and request.signum == signal.SIGTERM


def test_processes_exchange_requests_seldom_yet_in_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, 'perf_counter', lambda: now)
    request = StopRequest(patience=5)
    assert request.due(50)  # a single process always: it costs nothing
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda answers, op: None)
    exchanges = {}
    for seconds in (0.01, 0.5, 2.0, 20.0):
        exchanges[seconds] = []
        for update in range(150):
            now += seconds
            if request.due(50):
                exchanges[seconds].append(update)
                assert not request.agreed(torch.device('cpu'))
    gaps = {seconds: updates[-1] - updates[-2] for seconds, updates in exchanges.items()}
    assert gaps == {0.01: 50, 0.5: 10, 2.0: 2, 20.0: 1}


def test_handlers_are_restored(monkeypatch):
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest():
        assert all(signal.getsignal(signum) != handler for signum, handler in before.items())
    assert all(signal.getsignal(signum) == handler for signum, handler in before.items())


def test_another_thread_than_the_main_one_leaves_the_handlers_alone():
    seen = []

    def use():
        with StopRequest() as stop:
            seen.append(stop.agreed(torch.device('cpu')))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGHUP])
def test_before_training_a_signal_exits_at_once_and_later_it_is_noted(signum):
    with StopRequest() as stop:
        with pytest.raises(SystemExit) as raised:
            signal.raise_signal(signum)
        assert raised.value.code == 128 + signum
        with pytest.raises(SystemExit):  # nothing to interrupt yet: no traceback
            signal.raise_signal(signal.SIGINT)
        stop.defer()
        signal.raise_signal(signum)
        signal.raise_signal(signum)  # torchrun relays SIGTERM once more
        assert stop.agreed(torch.device('cpu')) and stop.name == signum.name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
