"""Exports: what a run leaves is a plain timm model again."""
import json

import pytest
import timm
import torch
import transformers
from PIL import Image

from backbones import randomise
from conftest import REPOSITORY
from timm_cgh import ContextEncoder
from timm_cgh.models import create_backbone
from timm_cgh.models.export import export_backbone

CONFIG = dict(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


@pytest.mark.parametrize('name,kwargs,chans', [
    ('resnet10t', {}, 3),
    ('resnet10t', {'in_chans': 1}, 1),
    ('vit_tiny_patch16_224', {'img_size': 32, 'patch_size': 4}, 3),
    ('efficientnet_lite0', {}, 3),
    ('resnet18_s2', {}, 3),
])
def test_local_dir_gives_the_same_features(tmp_path, name, kwargs, chans):
    model = randomise(create_backbone(name, **kwargs)).eval().to(memory_format=torch.channels_last)
    config = dict(input_size=(chans, 32, 32), mean=(0.5,) * chans, std=(0.5,) * chans)
    folder = export_backbone(model, tmp_path / 'export', **config)
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, chans, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), again(x), rtol=1e-5, atol=1e-5)  # layouts differ
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'model.safetensors']
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1  # readable by whom the umask allows
    assert [p.name for p in tmp_path.iterdir()] == ['export']  # nothing left beside it


def test_config_describes_this_run_and_not_the_imagenet_checkpoint(tmp_path):
    export_backbone(create_backbone('resnet50'), tmp_path, **CONFIG, tag='cgh_cross_3ep')
    config = json.loads((tmp_path / 'config.json').read_text())
    cfg = config['pretrained_cfg']
    assert config['architecture'] == 'resnet50' and config['num_classes'] == 0
    assert cfg['tag'] == 'cgh_cross_3ep' and cfg['input_size'] == [3, 32, 32] and cfg['mean'] == [0.1, 0.2, 0.3]
    assert cfg['crop_pct'] == 1.0 and cfg['interpolation'] == 'bilinear'
    assert not {'url', 'hf_hub_id', 'paper_ids', 'origin_url', 'license', 'test_input_size', 'test_crop_pct'} & set(cfg)


@torch.no_grad()
def test_transformers_loads_backbones_and_classifiers(tmp_path):
    backbone, names = randomise(create_backbone('test_resnet')).eval(), ['cat', 'dog', 'owl']
    classifier = randomise(create_backbone('test_resnet', num_classes=3)).eval()
    export_backbone(backbone, tmp_path / 'backbone', **CONFIG)
    export_backbone(classifier, tmp_path / 'classifier', **CONFIG, label_names=names)
    images, picture = torch.randn(2, 3, 32, 32), Image.new('RGB', (40, 50), 'teal')

    model = transformers.AutoModel.from_pretrained(tmp_path / 'backbone')
    torch.testing.assert_close(model(images).pooler_output, backbone(images))
    extract = transformers.pipeline('image-feature-extraction', model=str(tmp_path / 'backbone'), pool=True)
    transform = timm.data.create_transform(**CONFIG, interpolation='bilinear', crop_pct=1.0)
    torch.testing.assert_close(torch.tensor(extract(picture)), backbone(transform(picture)[None]))

    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'classifier')
    torch.testing.assert_close(model(images).logits, classifier(images))
    assert list(model.config.id2label.values()) == names
    classify = transformers.pipeline('image-classification', model=str(tmp_path / 'classifier'))
    assert {found['label'] for found in classify(picture)} == set(names)
    assert timm.create_model(f"local-dir:{tmp_path / 'classifier'}").pretrained_cfg['label_names'] == names


def test_transformers_loads_the_weights_of_this_repository():
    folders = [path.parent for path in REPOSITORY.glob('weights/*/config.json')]
    assert folders
    for folder in folders:
        images = torch.randn(2, 3, 32, 32)
        plain = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(model(images).pooler_output, plain(images))


def test_timms_own_script_takes_an_export_with_a_classifier_of_another_number_of_classes(tmp_path):
    backbone = randomise(create_backbone('resnet10t'))
    folder = export_backbone(backbone, tmp_path / 'export', **CONFIG)
    # what train.py of timm makes of --model and --pretrained, or of --pretrained-path, with --num-classes 7
    own_name = dict(model_name=f'local-dir:{folder}', pretrained=True)
    by_path = dict(model_name='resnet10t', pretrained=True, pretrained_cfg_overlay=dict(
        file=str(folder / 'model.safetensors'), num_classes=-1))
    for arguments in (own_name, by_path):
        model = timm.create_model(
            **arguments, in_chans=3, num_classes=7, drop_rate=0.0, checkpoint_path='', scriptable=False).eval()
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in backbone.state_dict().items())
        config = timm.data.resolve_data_config({}, model=model)
        assert (tuple(config['mean']) == CONFIG['mean']) == (arguments is own_name)


def test_encoder_of_a_features_only_backbone_exports(tmp_path):
    encoder = ContextEncoder(timm.create_model('resnet10t', features_only=True), hidden_dim=8, embed_dim=8)
    folder = export_backbone(encoder.backbone, tmp_path / 'export', **CONFIG)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert torch.equal(model.conv1[0].weight, encoder.backbone.state_dict()['conv1.0.weight'])
