"""The backbone contract, on the smallest architecture of each of timm's model modules (`-m slow` for all of them)."""
import os

import pytest
import timm

from zoo import SMALLEST, check_module, write_row

# families that differ in how they pool, normalise, lay out memory or hide parameters behind the last stage
QUICK = (
    'convnext', 'efficientnet', 'eva', 'hrnet', 'levit', 'mobilenetv3', 'mobilevit', 'nfnet', 'regnet', 'resnet',
    'swin_transformer', 'vision_transformer',
)


def test_zoo_covers_every_model_module_of_timm():
    ours = {name for name in timm.list_models() if not timm.model_entrypoint(name).__module__.startswith('timm.')}
    modules = {m for m in timm.list_modules() if not set(timm.list_models(module=m)) <= ours}
    assert len(modules) == len(SMALLEST)
    assert modules == set(SMALLEST)


def test_zoo_names_an_architecture_of_each_module():
    assert [m for m, (name, _) in SMALLEST.items() if name not in timm.list_models(module=m)] == []


@pytest.mark.parametrize('module', QUICK)
def test_family_trains_moves_its_teacher_and_reloads_in_plain_timm(module):
    check_module(module, *SMALLEST[module])


@pytest.mark.slow
@pytest.mark.parametrize('module', SMALLEST)
def test_every_module_trains_moves_its_teacher_and_reloads_in_plain_timm(module):
    """Writes its line of the table to the file that TIMM_CGH_ZOO_CSV names, such as results/zoo.csv."""
    row = check_module(module, *SMALLEST[module])
    if os.environ.get('TIMM_CGH_ZOO_CSV'):
        write_row(row, os.environ['TIMM_CGH_ZOO_CSV'])
