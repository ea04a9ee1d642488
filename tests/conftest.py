"""What several test modules share."""
import logging
import os
import sys
from pathlib import Path

import pytest

# before torch starts its threads: waiting ones would spin beside the processes that tests start
os.environ.setdefault('GOMP_SPINCOUNT', '1000')
os.environ.setdefault('OMP_NUM_THREADS', '1')  # sums in one order, as in the processes that tests start

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # the root scripts
SHARED_DATA = REPOSITORY.parent / 'shared' / 'data'


@pytest.fixture
def shared_data() -> Path:
    """Folder of real data sets beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f'no real data sets at {SHARED_DATA}')
    return SHARED_DATA


@pytest.fixture(scope='session')
def images(tmp_path_factory) -> Path:
    """24 small images in two class folders."""
    from training import make_images
    return make_images(tmp_path_factory.mktemp('data') / 'images')


@pytest.fixture(scope='session')
def encoder(tmp_path_factory) -> Path:
    """Export folder of a small backbone."""
    from evaluations import make_encoder
    return make_encoder(tmp_path_factory.mktemp('encoder') / 'export')


@pytest.fixture(autouse=True)
def nothing_stays():
    """A script that a test calls in this process has the root logger write to that test's stderr, which is closed
    when the test ends: the next one to log would get tracebacks on its own. It may also have small numbers flushed."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)
    if 'torch' in sys.modules:
        sys.modules['torch'].set_flush_denormal(False)
