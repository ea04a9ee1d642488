"""What tests ask of a process whose environment points the Hub's client at tests/hub_server.py."""
import contextlib
import io
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from unittest import mock

import timm
import torch
from huggingface_hub import ModelCard

from conftest import REPOSITORY
from script_runner import call_script
from timm_cgh.models import create_backbone, pretrained  # registers the models of this package
from timm_cgh.train.build import build_backbone

IMAGES = 'torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)'


@contextmanager
def process(env):
    """`call(function, *args, **kwargs)` in one process with the environment; exceptions come back."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        with mock.patch.dict(os.environ, env, clear=True):
            pool.submit(os.getpid).result()  # starts it
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def set_token(token):
    before = os.environ.pop('HF_TOKEN', '')
    if token:
        os.environ['HF_TOKEN'] = token
    return before


@contextmanager
def token(call, value):
    """Another login for a while, none if empty."""
    before = call(set_token, value)
    try:
        yield
    finally:
        call(set_token, before)


def run(script, *args):
    """Exit code and output of a root script, see `call_script`."""
    with io.StringIO() as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = call_script(script, *args)
        except SystemExit as stop:
            code = stop.code
        logging.getLogger().handlers.clear()  # they write to this output
        return code, output.getvalue()


@torch.no_grad()
def features(name, **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()(eval(IMAGES))


def backbone(name, **kwargs):
    """Width of the features of the backbone that train.py and the evaluation scripts create for `--model`."""
    return create_backbone(name, pretrained=True, **kwargs).num_features


@torch.no_grad()
def initialised_features(model, initial_checkpoint):
    return build_backbone(model, initial_checkpoint=initial_checkpoint).module.eval()(eval(IMAGES))


@torch.no_grad()
def torch_hub_features(name, **kwargs):
    return torch.hub.load(str(REPOSITORY), name, source='local', **kwargs).eval()(eval(IMAGES))


def publish_only(key, row):
    """Make this row all that is published, whatever lies in the repository's weights/."""
    pretrained.REPOSITORY = REPOSITORY / 'tests'
    pretrained.CHECKPOINTS.clear()
    pretrained.CHECKPOINTS[key] = row


def validate(card):
    ModelCard(card).validate()
