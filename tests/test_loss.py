"""Losses against slow, obvious float64 versions."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from timm_cgh import Contexts, CrossContextLoss, MemoryBank, info_nce, relation_cross_entropy
from timm_cgh.loss import relation as relation_module


def unit(rows, dim, seed):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def reference_relation(z, z_bank, t, t_bank, z_temp, t_temp):
    """Eq. 1-3, term by term, in float64."""
    z, z_bank, t, t_bank = (x.double() for x in (z, z_bank, t, t_bank))
    target = torch.softmax(F.cosine_similarity(t[:, None], t_bank[None], dim=2) / t_temp, dim=1)
    logits = z @ z_bank.T / z_temp  # rows are unit vectors: the product is the cosine, with the gradient in z of Eq. 2
    return -(target * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()


def reference_info_nce(q, k, bank, temp):
    q, k, bank = q.double(), k.double(), bank.double()
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ bank.T], dim=1) / temp
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def relative_error(value, reference):
    return float((value.double() - reference).norm() / reference.norm().clamp(min=1e-12))


def loss_and_grad(function, z, *args):
    z = z.clone().requires_grad_()
    loss = function(z, *args)
    loss.backward()
    return loss.detach(), z.grad


def check_against_float64(function, reference, z, *args, tolerance):
    loss, grad = loss_and_grad(function, z, *args)
    expected_loss, expected_grad = loss_and_grad(reference, z, *args)
    assert relative_error(loss, expected_loss) <= tolerance
    assert relative_error(grad, expected_grad.double()) <= tolerance


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 40),
    bank=st.integers(1, 300),
    dim=st.sampled_from([2, 16, 128, 512]),
    temps=st.sampled_from([(0.1, 0.08), (0.08, 0.04), (0.1, 0.04), (0.08, 0.08)]),
    seed=st.integers(0, 10 ** 6),
)
def test_relation_cross_entropy_matches_float64_reference(batch, bank, dim, temps, seed):
    data = unit(batch, dim, seed), unit(bank, dim, seed + 1), unit(batch, dim, seed + 2), unit(bank, dim, seed + 3)
    if bank == 1:  # one entry: both distributions are certain, loss and gradient vanish
        loss, grad = loss_and_grad(relation_cross_entropy, *data, *temps)
        assert loss == 0 and grad.abs().max() == 0
        return
    check_against_float64(relation_cross_entropy, reference_relation, *data, *temps, tolerance=1e-5)


@pytest.mark.parametrize('student_temp', [0.001, 0.1, 10.0])
@pytest.mark.parametrize('teacher_temp', [0.001, 0.04, 10.0])
@pytest.mark.parametrize('batch,bank', [(1, 1000), (64, 17), (33, 1000)])
def test_extreme_temperatures_stay_finite_and_accurate(student_temp, teacher_temp, batch, bank):
    data = unit(batch, 512, 0), unit(bank, 512, 1), unit(batch, 512, 2), unit(bank, 512, 3)
    check_against_float64(
        relation_cross_entropy, reference_relation, *data, student_temp, teacher_temp, tolerance=1e-4)


@pytest.mark.parametrize('temp', [0.001, 0.2, 10.0])
@pytest.mark.parametrize('batch,bank', [(1, 50), (64, 17), (33, 1000)])
def test_info_nce_matches_float64_reference(temp, batch, bank):
    q = unit(batch, 64, 0)
    k = F.normalize(q + unit(batch, 64, 1), dim=1)
    tolerance = 1e-5 if temp == 0.2 else 1e-4
    check_against_float64(info_nce, reference_info_nce, q, k, unit(bank, 64, 2), temp, tolerance=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 60),
    views=st.integers(1, 3),
    bank=st.integers(2, 300),
    chunk=st.sampled_from([1, 2000, 10 ** 9]),
    tile=st.sampled_from([1, 100, 1000, 10 ** 9]),
    temps=st.sampled_from([(0.1, 0.08), (0.08, 0.04)]),
)
def test_chunks_and_tiles_do_not_change_the_result(batch, views, bank, chunk, tile, temps):
    z = unit(views * batch, 32, 0).view(views, batch, 32)
    data = unit(bank, 32, 1), unit(batch, 32, 2), unit(bank, 32, 3), *temps
    contrast = unit(batch, 32, 2), unit(bank, 32, 1), 0.2
    sizes = relation_module._CHUNK_VALUES_CPU, relation_module._TILE_VALUES_CPU
    try:
        relation_module._CHUNK_VALUES_CPU, relation_module._TILE_VALUES_CPU = chunk, tile
        check_against_float64(
            relation_cross_entropy,
            lambda z, *rest: torch.stack([reference_relation(view, *rest) for view in z]).mean(),
            z, *data, tolerance=1e-5)
        check_against_float64(info_nce, reference_info_nce, z[0], *contrast, tolerance=1e-5)
    finally:
        relation_module._CHUNK_VALUES_CPU, relation_module._TILE_VALUES_CPU = sizes


@pytest.mark.parametrize('temps', [(0.1, 0.04), (0.08, 0.04), (0.08, 0.1)])
def test_products_in_tf32_change_the_loss_by_less_than_a_thousandth(temps):
    """What `--amp` sets on a GPU: factors with 10 bits of mantissa, sums of their products in float32."""
    def rounded(x):
        return (x.view(torch.int32) + (1 << 12) >> 13 << 13).view(torch.float32)

    student, teacher = unit(64, 512, 0), unit(64, 512, 1)
    banks = [F.normalize(unit(4096, 512, seed) + 3 * x[torch.arange(4096) % 64], dim=1)  # near the embeddings, and far
             for seed, x in ((2, student), (3, teacher))]
    data = student, banks[0], teacher, banks[1]
    loss, grad = loss_and_grad(relation_cross_entropy, *data, *temps)
    other, other_grad = loss_and_grad(relation_cross_entropy, *map(rounded, data), *temps)
    assert abs(float(other - loss)) < 1e-3
    assert 0 < relative_error(other_grad, grad.double()) < 2e-2  # where s - p nearly cancels


def test_only_the_student_receives_a_gradient():
    z, z_bank, t, t_bank = (unit(n, 16, n).requires_grad_() for n in (4, 9, 4, 9))
    relation_cross_entropy(z, z_bank, t, t_bank, 0.1, 0.04).backward()
    assert z.grad is not None and z_bank.grad is None and t.grad is None and t_bank.grad is None


def test_gradient_scales_with_the_incoming_one():
    data = unit(4, 16, 0), unit(9, 16, 1), unit(4, 16, 2), unit(9, 16, 3), 0.1, 0.04
    once = loss_and_grad(relation_cross_entropy, *data)[1]
    thrice = loss_and_grad(lambda *a: 3 * relation_cross_entropy(*a), *data)[1]
    torch.testing.assert_close(thrice, 3 * once)


def test_autocast_leaves_the_loss_in_float32():
    data = unit(8, 64, 0), unit(100, 64, 1), unit(8, 64, 2), unit(100, 64, 3), 0.1, 0.04
    expected = loss_and_grad(relation_cross_entropy, *data)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, grad = loss_and_grad(relation_cross_entropy, *data)
    assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])


def test_entropy_of_a_flat_target_is_ln_k():
    data = unit(4, 16, 0), unit(50, 16, 1), unit(4, 16, 2), unit(50, 16, 3)
    _, flat = relation_cross_entropy(*data, 0.1, 1e4, return_entropy=True)
    _, sharp = relation_cross_entropy(*data, 0.1, 1e-3, return_entropy=True)
    assert float(flat) == pytest.approx(math.log(50), rel=1e-4)
    assert float(sharp) < 0.2 * math.log(50)


@pytest.mark.parametrize('temps', [(0.0, 0.1), (0.1, -1.0), (float('nan'), 0.1)])
def test_a_temperature_that_is_not_positive_is_refused(temps):
    with pytest.raises(ValueError, match='temperature'):
        relation_cross_entropy(unit(2, 4, 0), unit(3, 4, 1), unit(2, 4, 2), unit(3, 4, 3), *temps)


def test_banks_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match='bank size'):
        relation_cross_entropy(unit(2, 4, 0), unit(3, 4, 1), unit(2, 4, 2), unit(5, 4, 3), 0.1, 0.04)


# ---- the objective


def embeddings_and_banks(batch=6, bank=40, dim=16):
    student = Contexts(unit(batch, dim, 0).requires_grad_(), unit(batch, dim, 1).requires_grad_())
    teacher = Contexts(unit(batch, dim, 2), unit(batch, dim, 3))
    return student, teacher, {'global': MemoryBank(bank, dim), 'hyper': MemoryBank(bank, dim)}


def test_cross_context_is_equation_6():
    student, teacher, banks = embeddings_and_banks()
    q, qh = banks['global'].embeddings, banks['hyper'].embeddings
    result = CrossContextLoss('cross', relation_weight=1.0)(student, teacher, banks)
    gh = reference_relation(student.global_embed, q, teacher.hyper_embed, qh, 0.1, 0.08)
    hg = reference_relation(student.hyper_embed, qh, teacher.global_embed, q, 0.08, 0.04)
    assert float(result['loss'].detach()) == pytest.approx(float((gh + hg).detach()), rel=1e-5)
    assert float(result['loss_gh']) == pytest.approx(float(gh), rel=1e-5)
    assert float(result['loss_hg']) == pytest.approx(float(hg), rel=1e-5)


def test_same_context_pairs_each_context_with_itself():
    student, teacher, banks = embeddings_and_banks()
    q, qh = banks['global'].embeddings, banks['hyper'].embeddings
    result = CrossContextLoss('same', temp_hyper_teacher=0.04)(student, teacher, banks)
    gg = reference_relation(student.global_embed, q, teacher.global_embed, q, 0.1, 0.04)
    hh = reference_relation(student.hyper_embed, qh, teacher.hyper_embed, qh, 0.08, 0.04)
    assert float(result['loss']) == pytest.approx(0.5 * float(gg + hh), rel=1e-5)


def test_global_context_is_ressl():
    student, teacher, banks = embeddings_and_banks()
    result = CrossContextLoss('global')(
        Contexts(student.global_embed), Contexts(teacher.global_embed), {'global': banks['global']})
    # ReSSL: cross-entropy of the student's logits over the queue with the teacher's sharpened softmax, weight 1
    q = banks['global'].embeddings.double()
    target = (teacher.global_embed.double() @ q.T / 0.04).softmax(dim=1)
    expected = F.cross_entropy(student.global_embed.double() @ q.T / 0.1, target)
    assert float(result['loss']) == pytest.approx(float(expected), rel=1e-5)
    assert 'loss_nce' not in result and 'entropy_hyper' not in result


@pytest.mark.parametrize('progress', [0.0, 0.3, 1.0])
def test_warmup_hands_over_from_info_nce_to_the_relation_loss(progress):
    student, teacher, banks = embeddings_and_banks()
    result = CrossContextLoss('cross')(student, teacher, banks, progress)
    contrast = sum(
        reference_info_nce(s, t, bank.embeddings, 0.2) for s, t, bank in zip(student, teacher, banks.values()))
    relation = 0.5 * float(result['loss_gh'] + result['loss_hg'])
    assert float(result['loss']) == pytest.approx(
        progress * relation + (1 - progress) * float(contrast), rel=1e-5)
    assert ('loss_nce' in result) == (progress < 1)


@pytest.mark.parametrize('options', [
    dict(context='crosss'),
    dict(temp_hyper=0.0),
    dict(temp_student=-0.1),
    dict(temp_hyper_teacher=0.0),
    dict(contrast_temp=float('nan')),
    dict(relation_weight=-1.0),
])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CrossContextLoss(**options)
