"""The methods of the comparison: each learns, is saved whole, and is what it is called."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_cgh import Contexts, MemoryBank, create_task
from timm_cgh.loss import InfoNCELoss
from timm_cgh.task import BASELINES

pytest.importorskip('lightly', reason='the methods are those of the lightly library')
from timm_cgh.task.baselines import create_baseline_task

WIDTHS = dict(hidden_dim=32, embed_dim=16, bank_size=64, momentum=0.9)


def baseline(method, **options):
    torch.manual_seed(0)
    return create_baseline_task(method, timm.create_model('resnet10t', num_classes=0), **{**WIDTHS, **options})


def views(batch=8, size=32):
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, batch, 3, size, size, generator=torch.Generator().manual_seed(2))
    return [images + 0.3 * n for n in noise]


@pytest.mark.parametrize('method', BASELINES)
def test_every_parameter_gets_a_gradient_and_the_loss_falls(method):
    task = baseline(method)
    optimizer = torch.optim.SGD(task.student.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        result = task(views())
        result['loss'].backward()
        assert all(p.grad is not None for p in task.student.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
        losses.append(result['loss'].item())
    assert min(losses[-3:]) < losses[0] and task.num_updates == 12
    assert 0 < result['std_global'] <= 1


@pytest.mark.parametrize('method', BASELINES)
def test_what_cgh_exempts_from_weight_decay_the_baselines_do_as_well(method):
    cgh = create_task('test_vit', hidden_dim=32, embed_dim=16, bank_size=64).student.no_weight_decay()
    task = create_baseline_task(method, timm.create_model('test_vit', num_classes=0), **WIDTHS)
    assert task.student.no_weight_decay() == cgh and 'backbone.pos_embed' in cgh


@pytest.mark.parametrize('method', BASELINES)
def test_a_checkpoint_holds_all_of_it(method):
    task = baseline(method)
    task(views())['loss'].backward()
    task.update_ema()
    state = copy.deepcopy(task.get_checkpoint_state())
    timm.create_model('resnet10t', num_classes=0).load_state_dict(state['state_dict'])  # strict: a plain timm model
    other = baseline(method)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    losses = [t(views())['loss'] for t in (task, other)]
    assert torch.equal(*losses) and other.num_updates == 1


@pytest.mark.parametrize('method', BASELINES)
def test_only_byol_and_dino_have_a_teacher_and_it_is_the_students_average(method):
    task = baseline(method)
    assert (task.teacher is not None) == (method in ('byol', 'dino'))
    if task.teacher is not None:
        before = {name: p.clone() for name, p in task.teacher.named_parameters()}
        students = dict(task.student.named_parameters())
        assert all(torch.equal(p, students[name]) for name, p in before.items())
        with torch.no_grad():
            for p in students.values():
                p.add_(1)
        task.update_ema()
        for name, p in task.teacher.named_parameters():
            torch.testing.assert_close(p, before[name] + 0.1)


def test_byol_and_simsiam_predict_the_other_view():
    for method in ('byol', 'simsiam'):
        task = baseline(method)
        reference = copy.deepcopy(task)
        loss = task(views())['loss']
        (z0, p0), (z1, p1) = reference.student(*views())
        if method == 'byol':
            (z0, _), (z1, _) = reference.teacher(*views())
        expected = -0.5 * (F.cosine_similarity(p0, z1).mean() + F.cosine_similarity(p1, z0).mean())
        torch.testing.assert_close(loss, expected)


def test_simclr_is_nt_xent_over_both_views():
    task = baseline('simclr', temperature=0.2)
    (z0, _), (z1, _) = copy.deepcopy(task).student(*views())
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    logits = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, torch.arange(16).roll(8))
    torch.testing.assert_close(task(views())['loss'], expected)


def test_swav_compares_with_unit_prototypes():
    task = baseline('swav', prototypes=10)
    task(views())
    assert task.student.predictor.n_prototypes == [10]
    torch.testing.assert_close(task.student.predictor.heads[0].weight.norm(dim=1), torch.ones(10))


def test_nnclr_replaces_one_view_by_its_nearest_neighbour():
    task = baseline('nnclr')
    bank = task.state[0].bank.clone()
    task(views())
    _, (z1, _) = baseline('nnclr').student(*views())
    assert torch.equal(task.state[0].bank[8:], bank[8:])
    torch.testing.assert_close(task.state[0].bank[:8], z1)


def test_moco_is_info_nce_on_the_global_context_alone():
    task = create_task('resnet10t', context='global', method='moco', bank_size=50, hidden_dim=32, embed_dim=16)
    assert isinstance(task.loss, InfoNCELoss) and task.student.hypercolumn is None and list(task.banks) == ['global']
    student, teacher = (Contexts(F.normalize(torch.randn(6, 16), dim=1)) for _ in range(2))
    bank = MemoryBank(50, 16)
    q, k = student.global_embed.double(), teacher.global_embed.double()
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ bank.embeddings.double().T], dim=1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
    result = InfoNCELoss(0.2)(student, teacher, {'global': bank})
    assert float(result['loss']) == pytest.approx(float(expected), rel=1e-5)


def test_what_is_no_method_is_refused():
    with pytest.raises(ValueError, match='method'):
        baseline('mocov9')
    with pytest.raises(ValueError, match='method'):
        create_task('resnet10t', method='simclr', bank_size=10, hidden_dim=8, embed_dim=8)
    with pytest.raises(ValueError, match='contrast_temp'):
        InfoNCELoss(0.0)
    with pytest.raises(ValueError, match='two contrastive views'):
        baseline('simclr')(views()[:1])
