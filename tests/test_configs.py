"""The recipes in configs/: every file is readable by its script, and says what the paper says."""
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torchvision.transforms.functional import to_tensor

import eval_linear
import train
from conftest import REPOSITORY
from data_files import picture
from timm_cgh.arguments import arguments_of
from timm_cgh.eval import create_eval_loader
from timm_cgh.models.backbone import create_backbone, resolve_data_config
from timm_cgh.models.export import export_backbone
from timm_cgh.task import CGHTask
from timm_cgh.train.build import build_backbone, build_task, check_views
from timm_cgh.train.settings import choose_views, settle, task_options
from training import TINY, check_ok, make_images, read_summary, train as run_train

RECIPES = sorted(p.name for p in (REPOSITORY / 'configs').glob('*.yaml') if not p.name.startswith('eval_'))
OF_THE_PAPER = {
    'imagenet_200.yaml': (1_281_167, 'linear 70.5'),
    'imagenet_200_pred.yaml': (1_281_167, 'linear 72.3'),
    'imagenet_multicrop_pred_200.yaml': (1_281_167, 'linear 75.7'),
    'imagenet_multicrop_pred_400.yaml': (1_281_167, 'linear 76.0'),
    'tiny_imagenet_400.yaml': (100_000, 'linear 53.8'),
    'stl10_400.yaml': (105_000, 'linear 92.0'),
}


def settings(name, images=1_281_167):
    args = train.parser.parse(['--config', str(REPOSITORY / 'configs' / name), '--device', 'cpu'])
    args.pretrained = False  # a download
    settle(args, images)
    return args


@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_builds_its_task_and_its_views(name):
    args = settings(name)
    banks, args.bank_size = args.bank_size, 64  # the size of the banks is the one thing that would take time
    backbone = build_backbone(**arguments_of(build_backbone, args)).module
    task = build_task(backbone, **task_options(args))
    size = resolve_data_config(backbone.pretrained_cfg, **arguments_of(resolve_data_config, args))['input_size'][-1]
    views = choose_views(args, size)
    assert isinstance(task, CGHTask) and task.student.embed_dim == args.embed_dim
    assert len(views) == 2 + (len(args.multi_crop) - 1 if args.multi_crop else 0) and banks >= 512
    check_views(task, views[:1] + views[-1:], args.in_chans)


@pytest.mark.parametrize('name', OF_THE_PAPER)
def test_recipes_of_the_paper_name_its_table_and_hold_its_numbers(name):
    images, figure = OF_THE_PAPER[name]
    with open(REPOSITORY / 'configs' / name, encoding='utf-8') as file:
        text = file.read()
    heading = ' '.join(line.lstrip('# ') for line in text.splitlines() if line.startswith('#'))
    assert re.match(r'Tab\. \d', heading) and figure in heading
    args = settings(name, images)
    assert (args.temp_student, args.temp_teacher, args.temp_hyper) == (0.1, 0.04, 0.08)
    assert (args.hidden_dim, args.embed_dim, args.momentum_teacher) == (4096, 512, 0.999)
    assert (args.batch_size, args.warmup_epochs, args.opt, args.momentum) == (256, 5, 'momentum', 0.9)
    big = name.startswith('imagenet')
    assert (args.lr, args.weight_decay) == ((0.05, 1e-4) if big else (0.06, 5e-4))
    assert args.no_decay_norm_bias == big and args.bank_size == (131072 if big else 16384)
    assert args.epochs == int(re.search(r'[24]00', name)[0]) and args.predictor == ('pred' in name)
    assert (args.multi_crop == [224, 192, 160, 128, 96]) == ('multicrop' in name)
    assert set(yaml.safe_load(text)) <= {action.dest for action in train.parser._actions}
    # as in the authors' code: plain ResNets, initialised as torchvision does
    assert args.model in ('resnet18', 'resnet50') and args.model_kwargs == {'zero_init_last': False}


def test_recipes_for_small_images_follow_the_authors_and_their_field():
    cifar, tiny = settings('cifar10.yaml', 50_000), settings('tiny_imagenet_400.yaml', 100_000)
    assert (cifar.gaussian_blur_prob, cifar.momentum_teacher) == (0.5, 0.99)
    assert cifar.model_kwargs == {'zero_init_last': False} and tiny.gaussian_blur_prob == 0.5
    assert tiny.mean == [0.480, 0.448, 0.398] and tiny.std == [0.277, 0.269, 0.282]  # its own, not ImageNet's


def test_moco_has_its_own_settings():
    args = settings('moco_v2.yaml')
    assert (args.method, args.hidden_dim, args.embed_dim, args.bank_size) == ('moco', 2048, 128, 65536)
    assert (args.lr, args.warmup_epochs, args.contrast_warmup_epochs, args.contrast_temp) == (0.03, 0, 0, 0.2)


@pytest.mark.slow
def test_the_cifar10_recipe_trains(tmp_path):
    images = make_images(tmp_path / 'images', size=32)
    check_ok(run_train('--config', REPOSITORY / 'configs' / 'cifar10.yaml', '--data-dir', images, '--epochs', 6,
                       '--batch-size', 12, '--bank-size', 24, '--workers', 0, '--output', tmp_path,
                       '--experiment', 'run'))
    rows = read_summary(tmp_path / 'run')
    assert len(rows) == 6 and 'train_loss_nce' in rows[0] and not rows[5]['train_loss_nce']  # five epochs of warm-up
    assert all(torch.isfinite(torch.tensor(float(row['train_loss']))) for row in rows)


@pytest.mark.parametrize('options', [
    ['--method', 'moco'],
    ['--multi-crop', '16', '12', '12', '--predictor'],
    ['--multi-crop', '--context', 'global'],
])
def test_variants_run_by_command_line(tmp_path, options):
    images = make_images(tmp_path / 'images')
    check_ok(run_train(*TINY, '--data-dir', images, '--epochs', 2, '--output', tmp_path, '--experiment', 'run',
                       *options))
    assert len(read_summary(tmp_path / 'run')) == 2 and (tmp_path / 'run' / 'export' / 'model.safetensors').exists()


def test_stl10_is_evaluated_at_the_size_of_its_images():
    evaluation = eval_linear.parser.parse(['-c', str(REPOSITORY / 'configs' / 'eval_linear_stl10.yaml')])
    config = dict(input_size=(3, *2 * evaluation.img_size), mean=(0.0,) * 3, std=(1.0,) * 3)
    image = picture(0, size=96)
    (pixels, _), = create_eval_loader([(image, 0)], config)
    assert torch.equal(pixels[0], to_tensor(image)) and settings('stl10_400.yaml').knn_img_size == 96


def test_the_recipe_that_continues_from_weights_starts_from_them(tmp_path):
    images = make_images(tmp_path / 'images', size=32)
    weights = export_backbone(
        create_backbone('test_resnet'), tmp_path / 'weights', input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    check_ok(run_train(
        '--config', REPOSITORY / 'configs' / 'continue.yaml', '--data-dir', images, '--model', f'local-dir:{weights}',
        '--img-size', 32, '--hidden-dim', 32, '--embed-dim', 8, '--epochs', 12, '--batch-size', 12, '--bank-size', 24,
        '--workers', 0, '--lr', 0, '--output', tmp_path, '--experiment', 'run'))
    before, after = (load_file(folder / 'model.safetensors') for folder in (weights, tmp_path / 'run' / 'export'))
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith('weight'))  # --lr 0
    assert 'train_loss_nce' in read_summary(tmp_path / 'run')[9]
