"""models/backbone.py: names, image configuration, and the plain model of a features_only wrapper."""
import pytest
import timm
import torch

from backbones import randomise
from input_errors import refused
from timm_cgh.models import create_backbone, plain_backbone
from timm_cgh.models.backbone import check_model, resolve_data_config

CFG = dict(input_size=(3, 224, 192), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation='bicubic')


def test_unknown_models_are_refused_with_similar_names(tmp_path):
    for name in ('resnet18', 'resnet18.a1_in1k', 'resnet18_s1', 'cgh_resnet18', 'hf-hub:me/name'):
        check_model(name)
    with refused('model', 'resnet5O: timm has no such model, did you mean ', 'resnet50'):
        check_model('resnet5O')
    with refused('model', f'no config.json in {tmp_path}'):
        check_model(f'local-dir:{tmp_path}')


def test_images_are_the_models_own_by_default():
    assert resolve_data_config(CFG) == CFG
    assert resolve_data_config({k: v for k, v in CFG.items() if k != 'interpolation'})['interpolation'] == 'bilinear'


def test_given_image_settings_replace_the_models():
    config = resolve_data_config(CFG, img_size=32, mean=[0.5, 0.6, 0.7], std=[0.2], interpolation='bilinear')
    assert config == dict(input_size=(3, 32, 32), mean=(0.5, 0.6, 0.7), std=(0.2,) * 3, interpolation='bilinear')
    assert resolve_data_config(CFG, img_size=(32, 48))['input_size'] == (3, 32, 48)


def test_grey_images_take_the_average_of_the_models_colours():
    config = resolve_data_config(CFG, in_chans=1)
    assert config['input_size'] == (1, 224, 192)
    assert config['mean'] == pytest.approx((0.2,)) and config['std'] == pytest.approx((0.5,))


def test_normalisation_with_another_number_of_channels_is_refused():
    with refused('mean', '2 values for 3 channels'):
        resolve_data_config(CFG, mean=[0.5, 0.5])
    with refused('std', '3 values for 1 channels'):
        resolve_data_config(CFG, in_chans=1, std=[0.5, 0.5, 0.5])


@pytest.mark.parametrize('name', [
    'resnet10t', 'convnext_atto', 'efficientnet_lite0', 'mobilenetv3_small_050', 'vit_tiny_patch16_224', 'levit_128s',
    'regnetx_002', 'swin_tiny_patch4_window7_224', 'hrnet_w18_small',
])
def test_features_only_weights_go_back_to_plain_names(name):
    wrapper = randomise(timm.create_model(name, features_only=True, out_indices=(-2, -1))).eval()
    plain = plain_backbone(wrapper).eval()
    trained = [k for k in plain.state_dict() if k not in plain.untrained_keys]
    assert len(trained) == len(wrapper.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps = wrapper(x)
        plain_maps = plain.forward_intermediates(x, indices=[-2, -1], output_fmt='NCHW', intermediates_only=True)
    for a, b in zip(maps, plain_maps):
        torch.testing.assert_close(a if a.shape == b.shape else a.permute(0, 3, 1, 2), b)


@pytest.mark.parametrize('name', ('vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'))
def test_features_only_models_built_for_one_size_go_back_as_well(name):
    wrapper = create_backbone(name, img_size=64, features_only=True, out_indices=(-2, -1))
    plain = plain_backbone(wrapper, img_size=64)
    assert plain(torch.zeros(1, 3, 64, 64)).shape == (1, plain.num_features)
    with pytest.raises(RuntimeError, match='has no place in the plain model'):
        plain_backbone(wrapper)


def test_layers_that_the_wrapper_lacks_are_listed():
    plain = plain_backbone(timm.create_model('efficientnet_lite0', features_only=True))
    assert 'conv_head.weight' in plain.untrained_keys
