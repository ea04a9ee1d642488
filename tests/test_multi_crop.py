"""Multi-crop: several contrastive crops for the student, one weak view for the teacher."""
import copy

import pytest
import torch

from input_errors import refused
from test_loss import loss_and_grad, reference_info_nce, reference_relation, relative_error, unit
from timm_cgh import (
    ContextEncoder, Contexts, CrossContextLoss, MemoryBank, create_task, info_nce, relation_cross_entropy)
from timm_cgh.data import multi_crop, two_views

SMALL = dict(bank_size=50, hidden_dim=32, embed_dim=16)


def crops_and_banks(crops=4, batch=6, bank=40, dim=16):
    student = Contexts(unit(crops * batch, dim, 0).view(crops, batch, dim), unit(batch, dim, 1))
    teacher = Contexts(unit(batch, dim, 2), unit(batch, dim, 3))
    return student, teacher, {'global': MemoryBank(bank, dim), 'hyper': MemoryBank(bank, dim)}


@pytest.mark.parametrize('crops', [1, 3])
@pytest.mark.parametrize('values', [1, 10 ** 9])  # bank values at a time: row by row, or all at once
def test_relation_loss_of_several_views_is_the_mean_over_them(crops, values, monkeypatch):
    monkeypatch.setattr('timm_cgh.loss.relation._CHUNK_VALUES_CPU', values)
    z = unit(crops * 20, 32, 0).view(crops, 20, 32)
    others = unit(101, 32, 1), unit(20, 32, 2), unit(101, 32, 3), 0.1, 0.04
    loss, grad = loss_and_grad(relation_cross_entropy, z, *others)
    expected, expected_grad = loss_and_grad(
        lambda z, *rest: torch.stack([reference_relation(view, *rest) for view in z]).mean(), z, *others)
    assert relative_error(loss, expected) < 1e-5 and relative_error(grad, expected_grad.double()) < 1e-5


def test_info_nce_of_several_views_is_the_mean_over_them():
    q, k, bank = unit(60, 32, 0).view(3, 20, 32), unit(20, 32, 1), unit(50, 32, 2)
    expected = torch.stack([reference_info_nce(view, k, bank, 0.2) for view in q]).mean()
    assert relative_error(info_nce(q, k, bank, 0.2), expected) < 1e-5


@pytest.mark.parametrize('context', ['cross', 'same', 'global'])
def test_small_crops_enter_the_terms_of_the_students_global_context_only(context):
    student, teacher, banks = crops_and_banks()
    q, qh = banks['global'].embeddings, banks['hyper'].embeddings
    result = CrossContextLoss(context)(student, teacher, banks)
    hyper_target, global_target = (teacher.hyper_embed, qh, 0.1, 0.08), (teacher.global_embed, q, 0.1, 0.04)

    def of_all_crops(target, target_bank, *temps):
        return torch.stack([reference_relation(z, q, target, target_bank, *temps) for z in student.global_embed]).mean()

    expected = {
        'cross': 0.5 * (of_all_crops(*hyper_target)
                        + reference_relation(student.hyper_embed, qh, teacher.global_embed, q, 0.08, 0.04)),
        'same': 0.5 * (of_all_crops(*global_target)
                       + reference_relation(student.hyper_embed, qh, teacher.hyper_embed, qh, 0.08, 0.08)),
        'global': of_all_crops(*global_target),
    }[context]
    assert relative_error(result['loss'], expected) < 1e-5


def test_one_crop_of_the_full_size_is_the_plain_two_view_step():
    views = two_views(32)
    assert multi_crop(views, [32]) == views
    torch.manual_seed(0)
    task = create_task('resnet10t', predictor=True, contrast_warmup=4, **SMALL)
    task.num_updates = 2
    images = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    again = copy.deepcopy(task)
    plain = task(images)['loss']
    plain.backward()
    contexts = again.student(images[1])
    several = Contexts(contexts.global_embed.unsqueeze(0), contexts.hyper_embed)  # as of a list of one crop
    loss = again.loss(several, again.teacher(images[0]), again.banks, again.warmup_progress)['loss']
    loss.backward()
    assert torch.equal(loss, plain)
    for (name, p), q in zip(task.student.named_parameters(), again.student.parameters()):
        assert torch.equal(p.grad, q.grad), name


def test_crops_of_one_size_pass_the_network_in_one_batch():
    encoder = ContextEncoder('resnet10t', hidden_dim=32, embed_dim=16).eval()
    seen = []
    encoder.backbone.conv1.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    images = [torch.randn(2, 3, size, size) for size in (64, 32, 64, 48, 32)]
    with torch.no_grad():
        contexts = encoder(*images)
        assert seen == [(4, 3, 64, 64), (4, 3, 32, 32), (2, 3, 48, 48)]
        assert contexts.global_embed.shape == (5, 2, 16) and contexts.hyper_embed.shape == (2, 16)
        for image, embedding in zip(images, contexts.global_embed):  # in eval mode no image depends on another
            torch.testing.assert_close(embedding, encoder(image).global_embed, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(contexts.hyper_embed, encoder(images[0]).hyper_embed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('context', ['cross', 'same', 'global'])
def test_a_step_with_crops_trains_every_parameter_and_fills_the_banks_with_the_weak_view(context):
    torch.manual_seed(0)
    task = create_task('resnet10t', context=context, predictor=True, **SMALL)
    reference = copy.deepcopy(task)
    images = [torch.randn(4, 3, size, size) for size in (48, 48, 32, 32, 16)]
    result = task(images)
    result['loss'].backward()
    assert all(p.grad is not None for p in task.student.parameters())
    expected = reference.teacher(images[0])
    for name, embedding in zip(task.banks, expected):
        torch.testing.assert_close(task.banks[name].embeddings[:4], embedding)
        assert task.banks[name].position == 4


def test_default_crops_are_those_of_the_authors_code():
    views = multi_crop(two_views(224), [])
    assert [view.size for view in views] == [224, 224, 192, 160, 128, 96]
    assert all((view.photometric is None) == (place == 0) for place, view in enumerate(views))
    published = [(0.2, 1.0), (0.172, 0.86), (0.143, 0.715), (0.114, 0.571), (0.086, 0.429)]
    for view, scale in zip(views[1:], published):
        assert view.scale == pytest.approx(scale, abs=0.003)
    given = multi_crop(two_views(224), [224, 96, 96], [0.3, 1, 0.05, 0.3, 0.1, 0.4])
    assert [view.scale for view in given[1:]] == [(0.3, 1), (0.05, 0.3), (0.1, 0.4)]


@pytest.mark.parametrize('sizes, scales, at_fault', [
    ([192, 96], None, 'multi_crop=192 96'),
    ([224, 256], None, 'multi_crop=224 256'),
    ([224, 96], [0.2, 1.0], 'multi_crop_scale=0.2 1'),
    ([224, 96], [0.2, 1.0, 0.5, 0.1], 'multi_crop_scale=0.2 1 0.5 0.1'),
    ([224, 96], [0.2, 1.0, 0.1], 'multi_crop_scale=0.2 1 0.1'),
])
def test_sizes_and_scales_out_of_bounds_are_refused(sizes, scales, at_fault):
    with refused(at_fault, 'must'):
        multi_crop(two_views(224), sizes, scales)


@pytest.mark.parametrize('temp', [1e-3, 1e-6, 1e-10])
def test_a_target_that_is_nearly_one_hot_stays_finite(temp):  # the limit of Sec. 4.5.2, NNCLR's nearest neighbour
    student, teacher, banks = crops_and_banks()
    loss = CrossContextLoss('cross', temp_hyper_teacher=temp)(student, teacher, banks)['loss_gh']
    nearest = (teacher.hyper_embed @ banks['hyper'].embeddings.T).argmax(dim=1)
    logits = student.global_embed @ banks['global'].embeddings.T / 0.1
    expected = torch.stack([torch.nn.functional.cross_entropy(view, nearest) for view in logits]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4 if temp < 1e-3 else 1e-2, atol=0)
    both = CrossContextLoss('cross', temp_hyper=temp)(student, teacher, banks)['loss']
    assert torch.isfinite(both)
