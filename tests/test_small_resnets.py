import pytest
import timm
import torch
from timm.layers import DropPath

from timm_cgh.models.small_resnets import SmallResNet

NAMES = ('resnet18_s1', 'resnet34_s1', 'resnet50_s1', 'resnet18_s2', 'resnet34_s2', 'resnet50_s2')
STRIDES = {'s1': [1, 1, 2, 4, 8], 's2': [1, 2, 4, 8, 16]}
NATIVE = {'s1': 32, 's2': 64}


def form(name):
    return name.rsplit('_', 1)[1]


def native_images(name, batch=2, chans=3):
    size = NATIVE[form(name)]
    return torch.randn(batch, chans, size, size)


def test_timm_lists_them_as_architectures():
    assert set(NAMES) <= set(timm.list_models('resnet*_s?'))
    assert not timm.list_pretrained('resnet*_s1*')


@pytest.mark.parametrize('name', NAMES)
def test_stem_is_one_3x3_stride_1_convolution(name):
    model = timm.create_model(name, num_classes=0)
    assert isinstance(model, SmallResNet)
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.bias) == ((3, 3), (1, 1), None)
    pools = [m for m in model.modules() if isinstance(m, torch.nn.MaxPool2d)]
    assert len(pools) == (form(name) == 's2')


@pytest.mark.parametrize('name', NAMES)
def test_only_the_first_convolution_differs_from_timms_resnet(name):
    small = timm.create_model(name).state_dict()
    stock = timm.create_model(name.rsplit('_', 1)[0]).state_dict()
    assert list(small) == list(stock)
    assert [key for key in stock if small[key].shape != stock[key].shape] == ['conv1.weight']


@pytest.mark.parametrize('name', NAMES)
def test_intermediate_maps_have_the_strides_of_feature_info(name):
    model = timm.create_model(name, num_classes=0).eval()
    x = native_images(name)
    final, maps = model.forward_intermediates(x)
    assert [info['reduction'] for info in model.feature_info] == STRIDES[form(name)]
    assert [x.shape[-1] // m.shape[-1] for m in maps] == STRIDES[form(name)]
    assert [m.shape[1] for m in maps] == [info['num_chs'] for info in model.feature_info]
    assert torch.equal(model.forward_head(final, pre_logits=True), model(x))


@pytest.mark.parametrize('name', ('resnet18_s1', 'resnet50_s2'))
def test_last_two_feature_maps_are_layer3_and_layer4(name):
    model = timm.create_model(name, features_only=True, out_indices=(-2, -1)).eval()
    x = native_images(name)
    assert model.feature_info.module_name() == ['layer3', 'layer4']
    assert model.feature_info.reduction() == STRIDES[form(name)][-2:]
    assert [x.shape[-1] // m.shape[-1] for m in model(x)] == STRIDES[form(name)][-2:]


@pytest.mark.parametrize('name', ('resnet18_s1', 'resnet18_s2'))
def test_native_images_pass_the_data_configuration_untouched(name):
    config = timm.data.resolve_model_data_config(timm.create_model(name))
    assert config['input_size'] == (3, NATIVE[form(name)], NATIVE[form(name)])
    assert config['crop_pct'] == 1.0


@pytest.mark.parametrize('name, output_stride, reductions', (
    ('resnet18_s1', 8, [1, 1, 2, 4, 8]),
    ('resnet18_s1', 4, [1, 1, 2, 4, 4]),
    ('resnet50_s1', 2, [1, 1, 2, 2, 2]),
    ('resnet50_s2', 8, [1, 2, 4, 8, 8]),
    ('resnet18_s2', 4, [1, 2, 4, 4, 4]),
    ('resnet18_s2', 32, [1, 2, 4, 8, 16]),
))
def test_output_stride_bounds_the_real_stride(name, output_stride, reductions):
    model = timm.create_model(name, features_only=True, output_stride=output_stride).eval()
    x = native_images(name)
    assert model.feature_info.reduction() == reductions
    assert [x.shape[-1] // m.shape[-1] for m in model(x)] == reductions


@pytest.mark.parametrize('name, output_stride', (('resnet18_s1', 1), ('resnet18_s2', 2), ('resnet18_s1', 5)))
def test_unreachable_output_stride_is_refused(name, output_stride):
    with pytest.raises(ValueError, match='output_stride'):
        timm.create_model(name, output_stride=output_stride)


def test_architecture_options_of_timms_resnet_pass_through():
    model = timm.create_model('resnet18_s1', in_chans=1, num_classes=7, drop_path_rate=0.2)
    assert model(native_images('resnet18_s1', chans=1)).shape == (2, 7)
    assert max(m.drop_prob for m in model.modules() if isinstance(m, DropPath)) == pytest.approx(0.2)
    model.reset_classifier(3)
    assert model(native_images('resnet18_s1', chans=1)).shape == (2, 3)


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = timm.create_model('resnet18_s1', num_classes=0).eval()
    x = native_images('resnet18_s1')
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append(model.conv1.weight.grad.clone())
    assert torch.allclose(*grads)


def test_pretrained_weights_do_not_exist():
    with pytest.raises(RuntimeError, match='resnet18_s1'):
        timm.create_model('resnet18_s1', pretrained=True)
