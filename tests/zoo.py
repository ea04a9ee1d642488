"""The smallest architecture of each of timm's model modules, and what is promised for all of them."""
import csv
import time
from pathlib import Path
from typing import NamedTuple

import timm
import torch

from timm_cgh import create_task
from timm_cgh.files import atomic_write

# module -> architecture with the fewest parameters, and a small side in px, such that its last map has more than one
# position (or the last batch norm of a model would see two values per channel, and gradients of 1e7)
SMALLEST = {
    'beit': ('beit_base_patch16_224', 64),
    'byoanet': ('halonet_h1', 256),
    'byobnet': ('test_byobnet', 64),
    'cait': ('cait_xxs24_224', 64),
    'coat': ('coat_tiny', 64),
    'convit': ('convit_tiny', 64),
    'convmixer': ('convmixer_768_32', 64),
    'convnext': ('test_convnext', 64),
    'cpubone': ('cpubone_nano', 64),
    'crossvit': ('crossvit_tiny_240', 240),
    'csatv2': ('csatv2', 128),
    'cspnet': ('cs3darknet_focus_s', 64),
    'cspnext': ('cspnext_tiny', 64),
    'davit': ('davit_tiny', 64),
    'deepseek_vit': ('deepseek_vit_412m', 112),
    'deit': ('deit_tiny_patch16_224', 64),
    'densenet': ('densenet121', 64),
    'dla': ('dla46x_c', 64),
    'dpn': ('dpn48b', 64),
    'edgenext': ('edgenext_xx_small', 64),
    'efficientformer': ('efficientformer_l1', 224),
    'efficientformer_v2': ('efficientformerv2_s0', 64),
    'efficientnet': ('test_efficientnet', 64),
    'efficientvim': ('efficientvim_m1', 128),
    'efficientvit_mit': ('efficientvit_b0', 64),
    'efficientvit_msra': ('efficientvit_m0', 128),
    'eva': ('vit_tiny_patch16_dinov3_qkvb', 64),
    'fasternet': ('fasternet_t0', 64),
    'fastvit': ('fastvit_t8', 64),
    'focalnet': ('focalnet_tiny_srf', 64),
    'gcvit': ('gcvit_xxtiny', 64),
    'gemma4_vit': ('gemma4_vit_167m', 64),
    'ghostnet': ('ghostnet_050', 64),
    'hardcorenas': ('hardcorenas_b', 64),
    'hgnet': ('hgnetv2_b0', 64),
    'hiera': ('hiera_tiny_224', 64),
    'hieradet_sam2': ('sam2_hiera_tiny', 64),
    'hrnet': ('hrnet_w18_small', 64),
    'iformer': ('iformer_t', 64),
    'inception_next': ('inception_next_atto', 64),
    'inception_resnet_v2': ('inception_resnet_v2', 128),
    'inception_v3': ('inception_v3', 112),
    'inception_v4': ('inception_v4', 112),
    'lcnetv2': ('lcnetv2_small', 64),
    'levit': ('levit_128s', 128),
    'lowformer': ('lowformer_b0', 64),
    'mambaout': ('test_mambaout', 64),
    'maxxvit': ('test_coatnet', 64),
    'metaformer': ('poolformerv2_s12', 64),
    'mlp_mixer': ('gmlp_ti16_224', 64),
    'mobilenetv3': ('mobilenetv3_small_050', 64),
    'mobilenetv5': ('mobilenetv5_base', 64),
    'mobilevit': ('mobilevit_xxs', 64),
    'mvitv2': ('mvitv2_tiny', 64),
    'naflexvit': ('naflexvit_base_patch16_parfac_gap', 64),
    'nasnet': ('nasnetalarge', 64),
    'nest': ('nest_tiny', 64),
    'nextvit': ('nextvit_small', 64),
    'nfnet': ('test_nfnet', 64),
    'pit': ('pit_ti_224', 64),
    'pnasnet': ('pnasnet5large', 64),
    'pvt_v2': ('pvt_v2_b0', 64),
    'qwen3_vit': ('qwen3_vit_88m', 64),
    'rdnet': ('rdnet_tiny', 64),
    'regnet': ('regnetx_002', 64),
    'repghost': ('repghostnet_050', 64),
    'repvit': ('repvit_m1', 64),
    'res2net': ('res2next50', 64),
    'resnest': ('resnest14d', 64),
    'resnet': ('test_resnet', 64),
    'resnetv2': ('resnetv2_18', 64),
    'rexnet': ('rexnet_100', 64),
    'selecsls': ('selecsls42', 128),
    'senet': ('legacy_seresnet18', 64),
    'sequencer': ('sequencer2d_s', 64),
    'shvit': ('shvit_s1', 128),
    'sknet': ('skresnet18', 64),
    'starnet': ('starnet_s050', 64),
    'swiftformer': ('swiftformer_xs', 64),
    'swin_transformer': ('swin_tiny_patch4_window7_224', 64),
    'swin_transformer_v2': ('swinv2_tiny_window8_256', 64),
    'swin_transformer_v2_cr': ('swinv2_cr_tiny_224', 64),
    'tiny_vit': ('tiny_vit_5m_224', 64),
    'tnt': ('tnt_s_legacy_patch16_224', 64),
    'tresnet': ('tresnet_m', 64),
    'twins': ('twins_svt_small', 64),
    'vgg': ('vgg11', 64),
    'visformer': ('visformer_tiny', 64),
    'vision_transformer': ('test_vit', 64),
    'vision_transformer_hybrid': ('vit_tiny_r_s16_p8_224', 64),
    'vision_transformer_relpos': ('test_vit_relpos', 64),
    'vision_transformer_sam': ('samvit_base_patch16_224', 64),
    'vitamin': ('vitamin_small_224', 64),
    'volo': ('volo_d1_224', 64),
    'vovnet': ('ese_vovnet19b_slim_dw', 64),
    'xception': ('legacy_xception', 64),
    'xception_aligned': ('xception41p', 64),
    'xcit': ('xcit_nano_12_p8_224', 64),
}


class Row(NamedTuple):
    """One line of the zoo's table."""
    module: str
    architecture: str
    img_size: int  # px
    maps: str  # channels@HxW of each map that enters the hypercolumn
    seconds: float


def create_plain(architecture, img_size):
    """timm's own model, without this package; `img_size` goes to the architectures that are built for one size."""
    try:
        return timm.create_model(architecture, num_classes=0, img_size=img_size)
    except TypeError as error:
        assert 'img_size' in str(error)
        return timm.create_model(architecture, num_classes=0)


def check_module(module, architecture, img_size, batch_size=2, momentum=0.9):
    """One training step, EMA update and reload in plain timm of one architecture.

    Args:
        module: timm model module
        architecture: timm model name
        img_size: side of the images, px
        batch_size: images in the step
        momentum: of the teacher; far from 1, so that one step moves it visibly

    Returns:
        its `Row`

    Raises:
        AssertionError: a promise does not hold
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    task = create_task(
        architecture,
        hidden_dim=64,
        embed_dim=32,
        bank_size=64,
        momentum=momentum,
        contrast_warmup=2,  # half way between them after one update: every term of the loss is alive
        img_size=img_size,
    )
    weak, contrastive = torch.randn(2, batch_size, 3, img_size, img_size)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=1e-2)

    # one step
    task.num_updates = 1
    loss = task([weak, contrastive])['loss']
    assert loss.isfinite(), f'{architecture}: loss {loss.item()}'
    loss.backward()
    missing = {name for name, p in task.student.named_parameters() if p.grad is None}
    plain = create_plain(architecture, img_size).eval()
    frozen = {f'backbone.{name}' for name, p in plain.named_parameters() if not p.requires_grad}  # by timm itself
    assert missing == frozen, f'{architecture}: no gradient for {missing}, timm freezes {frozen}'
    optimizer.step()

    # Eq. 7
    before = {name: p.clone() for name, p in task.teacher.named_parameters()}
    task.update_ema(2)
    student = dict(task.student.named_parameters())
    assert before.keys() == student.keys(), f'{architecture}: teacher and student have different parameters'
    for name, p in task.teacher.named_parameters():
        expected = momentum * before[name].double() + (1 - momentum) * student[name].detach().double()
        assert torch.allclose(p.double(), expected, rtol=1e-6, atol=1e-6), f'{architecture}: {name} moved otherwise'
    assert any(not torch.equal(p, before[name]) for name, p in task.teacher.named_parameters())
    del before

    # the moved weights are those it computes with: LeViT and others cache attention biases in eval mode
    with torch.no_grad():
        at_once = torch.cat(task.teacher(weak), dim=1)
        task.teacher.train()  # drops such caches
        task.train()
        fresh = torch.cat(task.teacher(weak), dim=1)
        assert torch.equal(fresh, at_once), f'{architecture}: the teacher computes with old weights'

        # reload
        backbone = task.student.backbone.eval()
        maps = task.student.forward_contexts(weak)[1]
        plain.load_state_dict(backbone.state_dict(), strict=True)
        features, reloaded = backbone(weak), plain(weak)
        assert features.ndim == 2 and features.isfinite().all(), f'{architecture}: features {tuple(features.shape)}'
        error = (features - reloaded).abs().max().item()
        assert error <= 1e-5, f'{architecture}: features of the reloaded model differ by {error}'

    shown = ' '.join(f'{m.shape[1]}@{m.shape[2]}x{m.shape[3]}' for m in maps)
    return Row(module, architecture, img_size, shown, round(time.perf_counter() - start, 1))


def write_row(row, path):
    """Add a row to a table, or replace the module's; the file is whole at any moment."""
    rows = {}
    if Path(path).exists():
        with open(path, newline='', encoding='utf-8') as file:
            rows = {old['module']: old for old in csv.DictReader(file)}
    rows[row.module] = row._asdict()
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, fieldnames=row._fields, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows[module] for module in sorted(rows))
