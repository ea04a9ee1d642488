import importlib.util
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

from timm_cgh.models import pretrained

ROOT = str(Path(__file__).parents[1])


def hub(name, **kwargs):
    return torch.hub.load(ROOT, name, source='local', **kwargs)


@pytest.fixture(scope='module')
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def trained():
    """A backbone whose weights and statistics are nobody's initialisation."""
    torch.manual_seed(1)
    model = timm.create_model('resnet18', num_classes=0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.01)
    return model.eval()


@pytest.fixture(scope='module')
def export(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'export'
    save_for_hf(trained, str(folder), safe_serialization=True)
    return folder


@pytest.mark.parametrize('architecture', ('resnet18', 'resnet50'))
def test_registry_entry_is_the_plain_timm_resnet_without_classifier(architecture, images):
    model = timm.create_model(f'cgh_{architecture}').eval()
    stock = timm.create_model(architecture, num_classes=0).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    assert type(model) is type(stock)
    assert model.pretrained_cfg['architecture'] == architecture
    assert torch.equal(model(images), stock(images))


def test_registry_entry_promises_no_imagenet_weights():
    cfg = timm.create_model('cgh_resnet18').pretrained_cfg
    assert not any(cfg.get(key) for key in ('url', 'hf_hub_id', 'file', 'test_input_size', 'paper_ids'))
    assert cfg['num_classes'] == 0
    assert not timm.list_pretrained('cgh_*')


def test_registry_entry_passes_architecture_options_through():
    model = timm.create_model('cgh_resnet18', num_classes=5, in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    features = timm.create_model('cgh_resnet18', features_only=True, out_indices=(-2, -1))
    assert features.feature_info.module_name() == ['layer3', 'layer4']


@pytest.mark.parametrize('name', ('cgh_resnet18', 'cgh_resnet50'))
def test_pretrained_says_in_one_line_that_no_checkpoint_is_published(name):
    for create in (timm.create_model, hub):
        with pytest.raises(RuntimeError, match=f'No CGH checkpoint is published for {name} yet.*export') as error:
            create(name, pretrained=True)
        assert '\n' not in str(error.value)


def test_unknown_checkpoint_tag_is_refused():
    with pytest.raises(RuntimeError, match="tagged 'in1k'"):
        timm.create_model('cgh_resnet18.in1k')


def test_a_row_of_the_table_is_all_that_a_checkpoint_needs(trained, images, tmp_path, monkeypatch):
    file = tmp_path / 'weights.safetensors'
    safetensors.torch.save_file(trained.state_dict(), file)
    monkeypatch.setitem(pretrained.CHECKPOINTS, 'cgh_resnet18.first', {'file': str(file)})
    for name in ('cgh_resnet18', 'cgh_resnet18.first'):
        model = timm.create_model(name, pretrained=True).eval()
        assert torch.equal(model(images), trained(images))
        assert model.pretrained_cfg['tag'] == 'first'
    classifier = timm.create_model('cgh_resnet18', pretrained=True, num_classes=4).eval()
    assert torch.equal(classifier.forward_head(classifier.forward_features(images), pre_logits=True), trained(images))
    assert classifier(images).shape == (2, 4)


def test_own_weights_load_the_way_timm_loads_them(trained, images, tmp_path):
    file = tmp_path / 'weights.pth'
    torch.save(trained.state_dict(), file)
    model = timm.create_model('cgh_resnet18', pretrained=True, pretrained_cfg_overlay={'file': str(file)}).eval()
    assert torch.equal(model(images), trained(images))


def test_hub_lists_and_explains_exactly_the_entry_points():
    spec = importlib.util.spec_from_file_location('hubconf', Path(ROOT) / 'hubconf.py')
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)  # torch.hub.list and torch.hub.help read it from GitHub only, by the same rule
    listed = {name: f for name, f in vars(hubconf).items() if callable(f) and not name.startswith('_')}
    assert sorted(listed) == ['cgh', 'cgh_resnet18', 'cgh_resnet50']
    assert all('Args:' in f.__doc__ for f in listed.values())


def test_hub_builds_any_timm_model():
    assert hub('cgh_resnet18').num_features == 512
    assert hub('cgh_resnet50', num_classes=3).get_classifier().out_features == 3
    assert hub('cgh').num_features == 2048
    model = hub('cgh', backbone='resnet18_s1', in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize('backbone', (None, 'resnet18', 'resnet18.a1_in1k'))
def test_hub_loads_an_export_folder(backbone, export, trained, images):
    model = hub('cgh', backbone=backbone, checkpoint=export).eval()
    assert torch.equal(model(images), trained(images))


def test_hub_loads_tensor_files(trained, images, tmp_path):
    safetensors.torch.save_file(trained.state_dict(), tmp_path / 'a.safetensors')
    torch.save({'state_dict': trained.state_dict()}, tmp_path / 'a.pth')
    for file in ('a.safetensors', 'a.pth'):
        model = hub('cgh', backbone='resnet18', checkpoint=str(tmp_path / file)).eval()
        assert torch.equal(model(images), trained(images))


class Surprise:
    pass


def test_hub_unpickles_nothing_but_tensors(tmp_path):
    torch.save({'state_dict': {}, 'surprise': Surprise()}, tmp_path / 'a.pth')
    with pytest.raises(Exception, match='[Ww]eights.only'):
        hub('cgh', backbone='resnet18', checkpoint=str(tmp_path / 'a.pth'))


def test_hub_names_what_is_wrong_with_a_checkpoint(export, tmp_path):
    with pytest.raises(ValueError, match="holds a resnet18.*not 'resnet34'"):
        hub('cgh', backbone='resnet34', checkpoint=export)
    with pytest.raises(FileNotFoundError, match='does not exist'):
        hub('cgh', checkpoint=tmp_path / 'absent.safetensors')
    with pytest.raises(FileNotFoundError, match='config.json'):
        hub('cgh', checkpoint=tmp_path)
    with pytest.raises(RuntimeError, match='layer'):
        hub('cgh', backbone='resnet34', checkpoint=export / 'model.safetensors')
