"""torchrun on two nodes: two network namespaces of this machine, with addresses and ports of their own (needs root)."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import REPOSITORY
from script_runner import ENV
from training import TINY, check_ok, read_summary, torchrun

NODES = {'cgh-node0': '10.213.7.1', 'cgh-node1': '10.213.7.2'}


def ip(*args):
    subprocess.run(['ip', *args], check=True, capture_output=True)


@pytest.fixture
def nodes():
    """Names of two namespaces that a virtual cable joins."""
    try:
        for name in NODES:
            ip('netns', 'add', name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f'no network namespaces here ({error})')
    try:
        ip('link', 'add', 'cgh0', 'type', 'veth', 'peer', 'name', 'cgh1')
        for number, (name, address) in enumerate(NODES.items()):
            ip('link', 'set', f'cgh{number}', 'netns', name)
            ip('-n', name, 'addr', 'add', f'{address}/24', 'dev', f'cgh{number}')
            for device in ('lo', f'cgh{number}'):
                ip('-n', name, 'link', 'set', device, 'up')
        yield list(NODES)
    finally:
        for name in NODES:
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


def start(nodes, args, log):
    """One process on each node; returns the launchers."""
    launchers = []
    for number, name in enumerate(nodes):
        launch = ['-m', 'torch.distributed.run', '--nnodes', '2', '--nproc_per_node', '1', '--max-restarts', '3',
                  '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'{NODES[nodes[0]]}:29713', '--rdzv-id', 'test',
                  '--rdzv-conf', f'is_host={int(number == 0)}', '--local-addr', NODES[name]]
        env = dict(ENV, GLOO_SOCKET_IFNAME=f'cgh{number}')
        command = ['ip', 'netns', 'exec', name, sys.executable, *launch, str(REPOSITORY / 'train.py'), *map(str, args)]
        with open(f'{log}{number}', 'w') as file:
            launchers.append(
                subprocess.Popen(command, env=env, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT))
    return launchers


def worker_of(launcher):
    """Process id of the training process below a launcher."""
    while True:
        for pid in filter(str.isdigit, os.listdir('/proc')):
            try:
                with open(f'/proc/{pid}/stat') as file:
                    parent = int(file.read().rpartition(')')[2].split()[1])
                with open(f'/proc/{pid}/cmdline') as file:
                    command = file.read()
            except OSError:
                continue
            if parent == launcher.pid and 'torch.distributed.run' not in command and 'train.py' in command:
                return int(pid)
        time.sleep(0.1)


@pytest.mark.slow
def test_two_nodes_give_the_losses_of_one_and_survive_the_death_of_a_process(tmp_path, nodes):
    args = [*TINY, '--dataset', 'digits', '--in-chans', 1, '--hflip', 0, '--batch-size', 32, '--epochs', 3,
            '--knn-interval', 0,
            '--recovery-interval', 2, '--log-interval', 1, '--shuffle-bn', '--output', tmp_path, '--resume', 'auto']
    check_ok(subprocess.run(torchrun(*args, '--experiment', 'one'), env=ENV, cwd=REPOSITORY, capture_output=True,
                            text=True))
    launchers = start(nodes, [*args, '--experiment', 'two'], tmp_path / 'log')
    folder = tmp_path / 'two'
    while not list(folder.glob('recovery-1-*.pth.tar')):
        assert all(launcher.poll() is None for launcher in launchers), (tmp_path / 'log0').read_text()
        time.sleep(0.1)
    os.kill(worker_of(launchers[1]), signal.SIGKILL)
    text = ''
    for number, launcher in enumerate(launchers):
        assert launcher.wait(600) == 0
        text += (tmp_path / f'log{number}').read_text()
    assert re.search(r'Resumed .*recovery-1-\d+\.pth\.tar at epoch 1, batch \d+', text)
    one, two = read_summary(tmp_path / 'one'), read_summary(folder)
    assert [row['epoch'] for row in two] == ['0', '1', '2']
    for single, double in zip(one, two):
        assert float(double['train_loss']) == pytest.approx(float(single['train_loss']), rel=1e-4)
