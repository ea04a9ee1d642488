"""Runs of train.py on tiny networks and images: what the tests of training share."""
import sys
from functools import partial

import numpy as np
import torch
from PIL import Image

import input_errors
import train as script
from conftest import REPOSITORY
from run_folders import read_table
from script_runner import run_script
from timm_cgh.train.checkpoint import read_checkpoint

# a network, heads and a data set small enough that a run is a matter of seconds
TINY = ['--model', 'test_resnet', '--img-size', '16', '--hidden-dim', '16', '--embed-dim', '8', '--bank-size', '16',
        '--batch-size', '8', '--workers', '0', '--lr', '0.03', '--knn-interval', '1', '--device', 'cpu']


def command(*args):
    """Command line of `python train.py`, for what needs a process of its own."""
    return [sys.executable, str(REPOSITORY / 'train.py'), *map(str, args)]


def torchrun(*args, processes=2):
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    return [sys.executable, *launch, str(REPOSITORY / 'train.py'), *map(str, args)]


train = partial(run_script, 'train.py')


def check_ok(done):
    """Standard output and error of a process that succeeded."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def check_refused(capsys, args, *named):
    """See `input_errors.check_refused`."""
    input_errors.check_refused(capsys, script, args, *named)


def make_images(folder, count=24, size=20, classes=('cat', 'dog')):
    """Random images in class folders (or in none): class k is bright in channel k."""
    rng = np.random.default_rng(0)
    for i in range(count):
        name = classes[i % len(classes)] if classes else ''
        pixels = rng.integers(0, 120, (size, size + 3, 3), dtype=np.uint8)
        pixels[..., i % 2] += 100
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f'{i:03d}.jpg')
    return folder


def read_summary(folder):
    """Rows of a run's summary.csv, values as text."""
    return read_table(folder / 'summary.csv')


def check_equal_checkpoints(first, second):
    """The last checkpoints of two run folders hold the same state, bit for bit."""
    a, b = (read_checkpoint(str(folder / 'last.pth.tar')) for folder in (first, second))
    for part in ('state_dict', 'task_state', 'optimizer', 'epoch'):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
