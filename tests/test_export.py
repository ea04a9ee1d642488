"""Exports and weights: what a run leaves is a plain timm model again."""
import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_cgh import ContextEncoder
from timm_cgh.hub import export_backbone, load_weights, plain_backbone
from timm_cgh.models import create_backbone

CONFIG = dict(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def random_statistics(model):
    """Batch statistics unlike the initial ones, so that a lost buffer shows."""
    for module in model.modules():
        if getattr(module, 'running_mean', None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize('name,kwargs,chans', [
    ('resnet10t', {}, 3),
    ('resnet10t', {'in_chans': 1}, 1),
    ('vit_tiny_patch16_224', {'img_size': 32, 'patch_size': 4}, 3),
    ('efficientnet_lite0', {}, 3),
    ('resnet18_s2', {}, 3),
])
def test_local_dir_gives_the_same_features(tmp_path, name, kwargs, chans):
    model = random_statistics(create_backbone(name, **kwargs)).eval().to(memory_format=torch.channels_last)
    config = dict(input_size=(chans, 32, 32), mean=(0.5,) * chans, std=(0.5,) * chans)
    folder = export_backbone(model, tmp_path / 'export', **config)
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, chans, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), again(x), rtol=1e-5, atol=1e-5)  # layouts differ
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'model.safetensors']
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1  # readable by whom the umask allows
    assert [p.name for p in tmp_path.iterdir()] == ['export']  # nothing left beside it


def test_config_is_the_runs_own(tmp_path):
    export_backbone(create_backbone('resnet50'), tmp_path, **CONFIG, tag='cgh_cross_3ep')
    config = json.loads((tmp_path / 'config.json').read_text())
    cfg = config['pretrained_cfg']
    assert config['architecture'] == 'resnet50' and config['num_classes'] == 0
    assert cfg['tag'] == 'cgh_cross_3ep' and cfg['input_size'] == [3, 32, 32] and cfg['mean'] == [0.1, 0.2, 0.3]
    assert cfg['crop_pct'] == 1.0 and cfg['interpolation'] == 'bilinear'
    assert not {'url', 'hf_hub_id', 'paper_ids', 'origin_url', 'license', 'test_input_size', 'test_crop_pct'} & set(cfg)


def test_a_classifier_can_be_put_on_an_export(tmp_path):
    folder = export_backbone(create_backbone('resnet10t'), tmp_path / 'export', **CONFIG)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=7)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize('name', [
    'resnet10t', 'convnext_atto', 'efficientnet_lite0', 'mobilenetv3_small_050', 'vit_tiny_patch16_224', 'levit_128s',
    'regnetx_002', 'swin_tiny_patch4_window7_224', 'hrnet_w18_small',
])
def test_features_only_weights_go_back_to_plain_names(name):
    wrapper = random_statistics(timm.create_model(name, features_only=True, out_indices=(-2, -1))).eval()
    plain = plain_backbone(wrapper).eval()
    tensors = plain.state_dict()
    trained = [k for k in tensors if k not in plain.untrained_keys]
    assert len(trained) == len(wrapper.state_dict())
    # the same maps come out of a wrapper made from the plain weights
    again = timm.create_model(name, features_only=True, out_indices=(-2, -1))
    mapped = plain_backbone(again)
    assert mapped.state_dict().keys() == tensors.keys()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps = wrapper(x)
        final, plain_maps = plain.forward_intermediates(x, indices=[-2, -1], output_fmt='NCHW')
    for a, b in zip(maps, plain_maps):
        a = a if a.shape == b.shape else a.permute(0, 3, 1, 2)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('name', ('vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'))
def test_features_only_models_built_for_one_size_go_back_as_well(name):
    wrapper = create_backbone(name, img_size=64, features_only=True, out_indices=(-2, -1))
    plain = plain_backbone(wrapper, img_size=64)
    assert plain(torch.zeros(1, 3, 64, 64)).shape == (1, plain.num_features)
    with pytest.raises(RuntimeError, match='has no place in the plain model'):
        plain_backbone(wrapper)


def test_layers_that_the_wrapper_lacks_are_named():
    plain = plain_backbone(timm.create_model('efficientnet_lite0', features_only=True))
    assert 'conv_head.weight' in plain.untrained_keys


def test_weights_load_from_safetensors_and_torch_files_without_their_classifier(tmp_path):
    source = timm.create_model('resnet10t', num_classes=10)
    save_file(source.state_dict(), tmp_path / 'a.safetensors')
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'b.pth')
    for file in ('a.safetensors', 'b.pth'):
        model = create_backbone('resnet10t')
        load_weights(model, str(tmp_path / file))
        assert torch.equal(model.conv1[0].weight, source.conv1[0].weight)


@pytest.mark.parametrize('change,named', [
    (lambda s: s.pop('bn1.weight'), 'lacks bn1.weight'),
    (lambda s: s.update(extra=torch.zeros(1)), 'no place for extra'),
    (lambda s: s.update({'bn1.weight': torch.zeros(3)}), 'another shape for bn1.weight'),
])
def test_weights_that_do_not_fit_are_named(tmp_path, change, named):
    state = create_backbone('resnet10t').state_dict()
    change(state)
    save_file(state, tmp_path / 'a.safetensors')
    with pytest.raises(RuntimeError, match=named):
        load_weights(create_backbone('resnet10t'), str(tmp_path / 'a.safetensors'))


def test_encoder_of_a_features_only_backbone_exports(tmp_path):
    encoder = ContextEncoder(timm.create_model('resnet10t', features_only=True), hidden_dim=8, embed_dim=8)
    folder = export_backbone(encoder.backbone, tmp_path / 'export', **CONFIG)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert torch.equal(model.conv1[0].weight, encoder.backbone.state_dict()['conv1.0.weight'])
