"""torch.hub and registry entry points without any network: weights in files, folders, and in the repository."""
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

from backbones import randomise
from conftest import REPOSITORY
from input_errors import refused
from run_folders import change_file
from timm_cgh.errors import InputError
from timm_cgh.eval.backbone import load_backbone
from timm_cgh.models import pretrained


def hub(name, **kwargs):
    return torch.hub.load(str(REPOSITORY), name, source='local', **kwargs)


@pytest.fixture(scope='module')
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def trained():
    """A backbone with weights and statistics unlike any initialisation."""
    torch.manual_seed(1)
    return randomise(timm.create_model('resnet18', num_classes=0)).eval()


@pytest.fixture(scope='module')
def export(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'export'
    save_for_hf(trained, str(folder), safe_serialization=True)
    return folder


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository in which nothing is published yet."""
    (tmp_path / 'hubconf.py').touch()
    monkeypatch.setattr(pretrained, 'REPOSITORY', tmp_path)
    monkeypatch.setattr(pretrained, 'CHECKPOINTS', {})
    return tmp_path


@pytest.fixture
def weights(repository, export):
    """weights/cgh_resnet18/ of that repository, in float16; and timm's model with these weights in float32."""
    folder = repository / 'weights' / 'cgh_resnet18'
    shutil.copytree(export, folder)
    state = safetensors.torch.load_file(export / 'model.safetensors')
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    safetensors.torch.save_file(half, folder / 'model.safetensors')
    stock = timm.create_model('resnet18', num_classes=0).eval()
    stock.load_state_dict(half)
    return folder, stock


@pytest.mark.parametrize('architecture', ('resnet18', 'resnet50'))
def test_registry_entry_is_the_plain_timm_resnet_without_classifier(architecture, images):
    model = timm.create_model(f'cgh_{architecture}').eval()
    stock = timm.create_model(architecture, num_classes=0).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    assert type(model) is type(stock)
    assert model.pretrained_cfg['architecture'] == architecture
    assert torch.equal(model(images), stock(images))


def test_registry_entry_promises_no_imagenet_weights(repository):
    cfg = timm.create_model('cgh_resnet18').pretrained_cfg
    assert not any(cfg.get(key) for key in ('url', 'hf_hub_id', 'file', 'test_input_size', 'paper_ids'))
    assert cfg['num_classes'] == 0


def test_registry_entry_passes_architecture_options_through():
    model = timm.create_model('cgh_resnet18', num_classes=5, in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    features = timm.create_model('cgh_resnet18', features_only=True, out_indices=(-2, -1))
    assert features.feature_info.module_name() == ['layer3', 'layer4']


@pytest.mark.parametrize('name', ('cgh_resnet18', 'cgh_resnet50'))
def test_pretrained_without_a_checkpoint_lists_those_that_exist_and_how_to_train_one(name, repository):
    for create in (timm.create_model, hub):
        with refused(name, 'no CGH checkpoint is published yet (available: none)', 'train.py', 'local-dir:RUN/export'):
            create(name, pretrained=True)


def test_an_installed_package_tells_where_the_weights_of_the_repository_are(repository):
    (repository / 'hubconf.py').unlink()  # as in site-packages
    with refused('cgh_resnet18', "comes without the repository's weights: torch.hub.load or pip install -e"):
        timm.create_model('cgh_resnet18', pretrained=True)


def test_pretrained_names_the_checkpoints_of_other_architectures(weights):
    with refused('cgh_resnet50', 'no CGH checkpoint is published yet (available: cgh_resnet18)'):
        timm.create_model('cgh_resnet50', pretrained=True)


def test_unknown_checkpoint_tag_is_refused(weights):
    with refused('cgh_resnet18', "no checkpoint tagged 'in1k' (available: cgh_resnet18)"):
        timm.create_model('cgh_resnet18.in1k')


@pytest.mark.parametrize('name', sorted({key.split('.')[0] for key in pretrained._folders()}))
def test_random_weights_are_for_the_images_of_the_published_ones(name):
    loaded, random = (load_backbone(name, no_pretrained=no_pretrained) for no_pretrained in (False, True))
    assert loaded.digest != random.digest and loaded.data_config == random.data_config
    assert list(timm.get_pretrained_cfg(name).input_size) == list(loaded.data_config['input_size'])


def test_every_row_pins_commit_and_content():
    for key, row in pretrained.CHECKPOINTS.items():
        repo_id, _, commit = row['hf_hub_id'].partition('@')
        assert key.startswith('cgh_') and repo_id.count('/') == 1 and row['metrics']
        assert len(bytes.fromhex(commit)) == 20 and len(bytes.fromhex(row['sha256'])) == 32


@pytest.mark.parametrize('key', pretrained._folders())
def test_every_folder_of_weights_loads_the_same_by_every_name(key, images):
    features = []
    for model in (
            timm.create_model(key, pretrained=True),
            timm.create_model(f'local-dir:{pretrained._folders()[key]}', pretrained=True),
            hub(key.split('.')[0])):
        assert model.pretrained_cfg['architecture'] == key.split('.')[0][4:]
        features.append(model.eval()(images))
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[2])
    torch.manual_seed(0)
    assert not torch.allclose(hub(key.split('.')[0], pretrained=False).eval()(images), features[0])


def test_float16_weights_in_the_repository_load_into_a_float32_model(weights, images):
    _, stock = weights
    for model in (timm.create_model('cgh_resnet18', pretrained=True).eval(), hub('cgh_resnet18').eval()):
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert torch.equal(model(images), stock(images))
    classifier = timm.create_model('cgh_resnet18', pretrained=True, num_classes=4, in_chans=1).eval()
    assert classifier(images[:, :1]).shape == (2, 4)
    maps = timm.create_model('cgh_resnet18', pretrained=True, features_only=True, out_indices=(4,)).eval()(images)
    torch.testing.assert_close(maps[0].mean(dim=(2, 3)), stock(images))


def test_folder_of_a_tag_is_that_checkpoint(weights):
    folder, _ = weights
    folder.rename(folder.with_name('cgh_resnet18.first'))
    assert pretrained.published('cgh_resnet18') == ['cgh_resnet18.first']
    for name in ('cgh_resnet18', 'cgh_resnet18.first'):
        assert timm.create_model(name, pretrained=True).pretrained_cfg['file'].endswith('cgh_resnet18.first')


def test_folder_is_compared_with_the_hash_of_its_row(weights):
    folder, _ = weights
    digest = hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    pretrained.CHECKPOINTS['cgh_resnet18'] = {'hf_hub_id': f"me/cgh@{'0' * 40}", 'sha256': digest}
    assert timm.create_model('cgh_resnet18', pretrained=True).num_features == 512
    pretrained.CHECKPOINTS['cgh_resnet18']['sha256'] = '0' * 64
    with refused(folder / 'model.safetensors', 'its hash is'):
        timm.create_model('cgh_resnet18', pretrained=True)


def test_folder_of_another_architecture_is_refused(weights):
    folder, _ = weights
    folder.rename(folder.with_name('cgh_resnet50'))
    with refused(folder.with_name('cgh_resnet50'), 'holds a resnet18, not a resnet50'):
        timm.create_model('cgh_resnet50', pretrained=True)


def test_weights_of_ones_own_load_as_in_timm(trained, images, tmp_path):
    file = tmp_path / 'weights.pth'
    torch.save(trained.state_dict(), file)
    model = timm.create_model('cgh_resnet18', pretrained=True, pretrained_cfg_overlay={'file': str(file)}).eval()
    assert torch.equal(model(images), trained(images))


def test_zip_of_the_repository_works_in_torch_hub(weights, images, tmp_path):
    """What torch.hub does with GitHub's zip, once it is unpacked where it keeps them; with no more than the stated
    dependencies, in a process that has no other timm_cgh in its path."""
    folder, stock = weights
    with zipfile.ZipFile(tmp_path / 'main.zip', 'w') as archive:
        for path in [REPOSITORY / 'hubconf.py', *(REPOSITORY / 'timm_cgh').rglob('*.py')]:
            archive.write(path, path.relative_to(REPOSITORY))
        for path in folder.iterdir():
            archive.write(path, path.relative_to(tmp_path))
    with zipfile.ZipFile(tmp_path / 'main.zip') as archive:
        archive.extractall(tmp_path / 'torch' / 'hub' / 'me_timm-cgh_main')
    torch.save(images, tmp_path / 'images.pt')
    code = """
import sys
sys.modules.update(dict.fromkeys(('sklearn', 'matplotlib', 'datasets', 'webdataset', 'onnx', 'pytest')))  # no import
import timm, torch
hub = dict(trust_repo=True, skip_validation=True)
names = torch.hub.list('me/timm-cgh:main', **hub)
assert all('Args:' in torch.hub.help('me/timm-cgh:main', name, **hub) for name in names)
model = torch.hub.load('me/timm-cgh:main', 'cgh_resnet18', pretrained=True, **hub).eval()
assert sys.modules['timm_cgh'].__file__.startswith(sys.argv[1])
assert timm.list_pretrained('cgh_*') == ['cgh_resnet18']
torch.save((names, model(torch.load(sys.argv[1] + '/images.pt'))), sys.argv[1] + '/out.pt')
"""
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    env.update(TORCH_HOME=str(tmp_path / 'torch'), HF_HUB_OFFLINE='1')
    command = [sys.executable, '-c', code, str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    names, features = torch.load(tmp_path / 'out.pt')
    assert names == ['cgh', 'cgh_resnet18', 'cgh_resnet50']
    torch.testing.assert_close(features, stock(images))


def test_hub_builds_any_timm_model():
    assert hub('cgh_resnet18', pretrained=False).num_features == 512
    assert hub('cgh_resnet50', pretrained=False, num_classes=3).get_classifier().out_features == 3
    assert hub('cgh').num_features == 2048
    model = hub('cgh', backbone='resnet18_s1', in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize('backbone', (None, 'resnet18', 'resnet18.a1_in1k'))
def test_hub_loads_an_export_folder(backbone, export, trained, images):
    model = hub('cgh', backbone=backbone, checkpoint=export).eval()
    assert torch.equal(model(images), trained(images))


def test_hub_loads_a_file_of_another_program(trained, images, tmp_path):
    moco = {f'module.encoder_q.{name}': value for name, value in trained.state_dict().items()}
    torch.save({'state_dict': moco}, tmp_path / 'moco.pth')
    model = hub('cgh', backbone='resnet18', checkpoint=str(tmp_path / 'moco.pth')).eval()
    assert torch.equal(model(images), trained(images))
    classifier = hub('cgh', backbone='resnet18', checkpoint=tmp_path / 'moco.pth', num_classes=7, pretrained=True)
    assert classifier.eval()(images).shape == (len(images), 7)
    assert torch.equal(classifier.forward_head(classifier.forward_features(images), pre_logits=True), model(images))


def test_hub_names_what_is_wrong_with_a_checkpoint(export):
    with refused(export, 'holds a resnet18, not a resnet34'):
        hub('cgh', backbone='resnet34', checkpoint=export)
    with refused('checkpoint', 'the file lacks layer1.2.conv1.weight'):
        hub('cgh', backbone='resnet34', checkpoint=export / 'model.safetensors')


def truncated(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-1000])


def with_tensors(change):
    def spoil(folder):
        state = safetensors.torch.load_file(folder / 'model.safetensors')
        change(state)
        safetensors.torch.save_file(state, folder / 'model.safetensors')
    return spoil


def with_config(**changes):
    return lambda folder: change_file(folder / 'config.json', **changes)


@pytest.mark.parametrize('options', [{}, {'num_classes': 5}, {'features_only': True}], ids=str)
@pytest.mark.parametrize('spoil, message', [
    (truncated, 'model.safetensors: not a complete safetensors file'),
    (with_tensors(lambda state: state.pop('layer4.1.bn2.running_var')), 'the file lacks layer4.1.bn2.running_var'),
    (with_tensors(lambda state: state.update({'extra': torch.zeros(1)})), 'the model has no place for extra'),
    (with_tensors(lambda state: state.update({'bn1.weight': torch.zeros(3)})),
     r'bn1.weight is \(3,\) in the file, \(64,\) in the model'),
    (with_config(architecture='resnet34'), 'holds a resnet34, not a resnet18|model.safetensors: the file lacks'),
    (with_config(model_args={'no_such': 1}), "config.json: .* unexpected keyword argument 'no_such'"),
    (lambda folder: (folder / 'config.json').write_text('{'), 'config.json: Expecting property name'),
    (lambda folder: (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin'), 'has no model.safetensors'),
])
def test_broken_folders_are_refused_in_one_line_by_every_loader(spoil, message, options, weights):
    folder, _ = weights
    spoil(folder)
    for load in (lambda: timm.create_model('cgh_resnet18', pretrained=True, **options),
                 lambda: hub('cgh_resnet18', pretrained=True, **options),
                 lambda: hub('cgh', checkpoint=folder, **options)):
        with pytest.raises(InputError, match=message) as error:
            load()
        assert '\n' not in str(error.value)
