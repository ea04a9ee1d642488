import copy

import pytest
import timm
import torch
import torch.nn as nn

from timm_cgh import CGHTask, ContextEncoder, CrossContextLoss, create_task
from timm_cgh.models import default_out_indices

SMALL = dict(bank_size=50, hidden_dim=32, embed_dim=16)


def small_task(**options):
    torch.manual_seed(0)
    return create_task('resnet10t', **{**SMALL, **options})


def views(batch=4, size=32):
    return [torch.randn(batch, 3, size, size), torch.randn(batch, 3, size, size)]


def test_global_context_is_the_plain_models_pooled_feature():
    encoder = ContextEncoder('resnet10t', hidden_dim=32, embed_dim=16).eval()
    x = torch.randn(2, 3, 64, 64)
    context, maps = encoder.forward_contexts(x)
    torch.testing.assert_close(context, encoder.backbone(x))
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 4, 4), (512, 2, 2)]  # layer3, layer4


def test_embeddings_are_float32_unit_rows_also_under_autocast():
    encoder = ContextEncoder('resnet10t', hidden_dim=32, embed_dim=16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        contexts = encoder(torch.randn(3, 3, 32, 32))
    for embedding in contexts:
        assert embedding.dtype == torch.float32 and embedding.shape == (3, 16)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))


def test_plain_vits_take_evenly_spaced_blocks_and_pyramids_the_last_two_stages():
    assert default_out_indices([16] * 12) == (2, 5, 8, 11)
    assert default_out_indices([2, 4, 8, 16, 32]) == (-2, -1)
    assert default_out_indices([16]) == (-1,)


@pytest.mark.parametrize('indices', [(7,), (-6, -1), ()])
def test_a_stage_out_of_range_is_refused(indices):
    with pytest.raises(ValueError, match='out_indices'):
        ContextEncoder('resnet10t', out_indices=indices)


@pytest.mark.parametrize('wrapped', [False, True])
def test_a_stage_named_twice_counts_once_and_in_any_order(wrapped):
    stages = dict(out_indices=(-1, 2, 4))
    options = dict(features_only=True, **stages) if wrapped else dict(num_classes=0)
    backbone, stages = timm.create_model('test_resnet', **options), {} if wrapped else stages
    encoder = ContextEncoder(backbone, hidden_dim=32, embed_dim=16, **stages).eval()
    images = torch.randn(2, 3, 32, 32)
    assert [m.shape[1] for m in encoder.forward_contexts(images)[1]] == [48, 96]
    assert encoder(images).hyper_embed.shape == (2, 16)


def test_a_model_without_maps_is_refused():
    with pytest.raises(ValueError, match='no spatial feature maps'):
        ContextEncoder(nn.Linear(3, 3))


@pytest.mark.parametrize('name', ['resnet10t', 'swin_tiny_patch4_window7_224', 'efficientnet_lite0'])
def test_features_only_backbone_is_taken(name):
    backbone = timm.create_model(name, features_only=True, out_indices=(2, 3))
    encoder = ContextEncoder(backbone, hidden_dim=32, embed_dim=16).eval()
    x = torch.randn(1, 3, 224, 224)
    context, maps = encoder.forward_contexts(x)
    assert maps[1].shape[1] == backbone.feature_info.channels()[1]
    torch.testing.assert_close(context, maps[-1].mean((2, 3)))
    assert encoder(x).hyper_embed.shape == (1, 16)


def test_global_context_builds_no_hypercolumn():
    task = small_task(context='global')
    assert task.student.hypercolumn is None and list(task.banks) == ['global']
    assert set(task(views())) == {'loss', 'loss_gg', 'entropy_global', 'std_global'}


@pytest.mark.parametrize('context', ['cross', 'same', 'global'])
def test_every_student_parameter_gets_a_gradient_and_no_teacher_one(context):
    task = small_task(context=context, predictor=True, contrast_warmup=10)
    task.num_updates = 5
    task(views())['loss'].backward()
    assert all(p.grad is not None for p in task.student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())


def test_predictor_is_on_the_student_alone():
    task = small_task(predictor=True)
    assert any('predictor' in name for name, _ in task.student.named_parameters())
    assert not any('predictor' in name for name, _ in task.teacher.named_parameters())
    assert not any('predictor' in name for name in task.get_checkpoint_state()['state_dict'])


def test_teacher_moves_by_one_minus_momentum():
    task = small_task(momentum=0.9)
    with torch.no_grad():
        for p in task.student.parameters():
            p.add_(torch.randn_like(p))
    before = copy.deepcopy(task.teacher)
    buffers = {k: v.clone() for k, v in task.teacher.named_buffers()}
    task.update_ema(step=7)
    students = dict(task.student.named_parameters())
    for (name, new), old in zip(task.teacher.named_parameters(), before.parameters()):
        torch.testing.assert_close(new.detach(), 0.9 * old.detach() + 0.1 * students[name].detach())
    assert all(torch.equal(v, buffers[k]) for k, v in task.teacher.named_buffers())  # Eq. 7 is about parameters
    assert task.num_updates == 7


def test_only_the_backbones_batch_norm_is_split():
    task = small_task(bn_splits=4, predictor=True)
    for encoder in (task.student, task.teacher):
        assert type(encoder.backbone.bn1).__name__.startswith('Split')
        assert type(encoder.hypercolumn.norm) is nn.BatchNorm2d
    assert type(task.student.predictor[1]) is nn.BatchNorm1d


def test_split_batch_norm_sees_the_teachers_images_in_another_order_and_gives_them_back_in_theirs():
    images = views(8)
    weak = images[0].clone()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    task, plain = small_task(bn_splits=4), small_task()
    split = task._teach(weak)[0]
    parts = [plain.teacher.forward_contexts(weak[order[i:i + 2]]) for i in range(0, 8, 2)]
    pooled, maps = torch.cat([part[0] for part in parts]), [torch.cat(m) for m in zip(*(part[1] for part in parts))]
    teacher = plain.teacher
    expected = teacher.projector(pooled), teacher.hyper_projector(teacher.hypercolumn(maps))
    for found, context in zip(split, expected):
        torch.testing.assert_close(found[order], nn.functional.normalize(context, dim=1))
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(plain.teacher(weak), split))
    task(images)['loss'].backward()
    assert all(p.grad is not None for p in task.student.parameters())
    assert task.student.backbone.state_dict().keys() == plain.student.backbone.state_dict().keys()


def test_teacher_normalises_by_the_batch_and_drops_nothing():
    task = small_task(drop_rate=0.5, drop_path_rate=0.5).train()
    norms = [m for m in task.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.training for m in norms)
    x = views()[0]
    with torch.no_grad():
        first, second = task.teacher(x), task.teacher(x)
    assert torch.equal(first.global_embed, second.global_embed)
    task.eval()
    assert not any(m.training for m in norms)


def test_banks_take_the_teachers_embeddings_after_the_loss():
    task = small_task()
    weak, contrastive = views()
    before = {name: bank.embeddings.clone() for name, bank in task.banks.items()}
    reference = copy.deepcopy(task)
    task([weak, contrastive])
    expected = reference.teacher(weak)
    for name, embeddings in zip(task.banks, expected):
        torch.testing.assert_close(task.banks[name].embeddings[:4], embeddings)
        assert torch.equal(task.banks[name].embeddings[4:], before[name][4:])


def test_checkpoint_state_is_a_plain_timm_model_and_the_rest():
    task = small_task(predictor=True)
    task(views())['loss'].backward()
    task.update_ema()
    state = task.get_checkpoint_state()
    plain = timm.create_model('resnet10t', num_classes=0)
    plain.load_state_dict(state['state_dict'])  # strict
    assert task.get_checkpoint_state(ema=True) == {}
    other = small_task(predictor=True)
    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    for (name, a), b in zip(task.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name
    assert other.num_updates == 1


def test_state_of_another_model_is_refused():
    state = small_task().get_checkpoint_state()
    with pytest.raises(RuntimeError):
        small_task(embed_dim=8).load_checkpoint_state(state['state_dict'], state['task_state'])
    with pytest.raises(RuntimeError):
        small_task(context='global').load_checkpoint_state(state['state_dict'], state['task_state'])
    with pytest.raises(RuntimeError, match='plain model'):
        small_task().load_checkpoint_state(state['state_dict'], None)


def test_warmup_progress_follows_the_updates():
    task = small_task(contrast_warmup=4)
    seen = []
    for _ in range(6):
        seen.append(task.warmup_progress)
        task.update_ema()
    assert seen == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize('options', [
    dict(momentum=1.5),
    dict(contrast_warmup=-1),
    dict(bank_size=0),
    dict(embed_dim=0),
])
def test_bad_task_options_are_refused(options):
    with pytest.raises(ValueError):
        small_task(**options)


def test_loss_and_encoder_must_agree_about_the_hypercolumn():
    with pytest.raises(ValueError, match='hypercolumn'):
        CGHTask(ContextEncoder('resnet10t', hidden_dim=8, embed_dim=8), CrossContextLoss('global'), bank_size=10)


def test_one_view_or_three_are_refused():
    with pytest.raises(ValueError, match='views'):
        small_task()(views()[:1])


def test_compile_leaves_names_and_backbone_plain():
    task = small_task()
    names = list(task.state_dict())
    backbone = task.compile(backend='eager')
    assert backbone is task.student.backbone and list(task.state_dict()) == names
    assert torch.isfinite(task(views())['loss'])


def test_teacher_keeps_no_stale_cache_of_its_parameters():
    task = create_task('levit_128s', momentum=0.0, **SMALL, img_size=64)  # caches attention biases in eval mode
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        task.teacher(x)
        for p in task.student.parameters():
            p.add_(0.1 * torch.randn_like(p))
    task.update_ema()
    fresh = copy.deepcopy(task)
    fresh.train()
    with torch.no_grad():
        torch.testing.assert_close(task.teacher(x).global_embed, fresh.teacher(x).global_embed)
