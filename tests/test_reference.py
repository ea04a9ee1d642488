"""Five training steps against an independent float64 reference, written from the paper's equations.

Backbone, hypercolumn and heads are the project's modules; everything that is CGH (Eq. 1-7, the InfoNCE warm-up, banks,
teacher, multi-crop, predictors) is done once more here, in the most literal way.
"""
import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F

from timm_cgh import create_task

STEPS, BATCH, BANK, MOMENTUM, LR, WARMUP = 5, 6, 20, 0.9, 0.1, 3
TAU = dict(student=0.1, teacher=0.04, hyper=0.08, contrast=0.2)


def build(predictor, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    task = create_task('test_resnet', bank_size=BANK, momentum=MOMENTUM, contrast_warmup=WARMUP, hidden_dim=16,
                       embed_dim=8,
                       predictor=predictor, hyper_norm_layer=norm)
    return task.double()


def draw_views(step, sizes=(32, 32)):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(BATCH, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes]


def distribution(embedding, bank, tau):
    """Eq. 1, 2, 4: similarities to every row of a bank, as probabilities."""
    return torch.stack([torch.exp((row * z).sum() / tau) for z in embedding for row in bank]).view(len(embedding), -1)


def cross_entropy(prediction, target):
    """Eq. 3, 5, averaged over the batch."""
    prediction = prediction / prediction.sum(dim=1, keepdim=True)
    target = target / target.sum(dim=1, keepdim=True)
    return -sum((p * y.log()).sum() for y, p in zip(prediction, target)) / len(target)


def info_nce(query, key, bank):
    total = 0
    for q, k in zip(query, key):
        logits = torch.cat([(q * k).sum().view(1), bank @ q]) / TAU['contrast']
        total = total - (logits[0] - logits.exp().sum().log())
    return total / len(query)


class Reference:
    """Student, teacher and banks of a task, updated by hand."""

    def __init__(self, task):
        self.student = copy.deepcopy(task.student)
        self.teacher = copy.deepcopy(task.teacher)
        self.banks = {name: bank.embeddings.clone() for name, bank in task.banks.items()}
        self.step = 0

    def embed(self, encoder, *crops):
        """Global embeddings of all crops, hypercolumn embedding of the first.

        Crops of one size pass the backbone in one batch, and all crops the head: that is what batch norm sees.
        """
        pooled = {}
        for size in dict.fromkeys(crop.shape[-1] for crop in crops):
            alike = [i for i, crop in enumerate(crops) if crop.shape[-1] == size]
            features, maps = encoder.forward_contexts(torch.cat([crops[i] for i in alike]))
            pooled.update(zip(alike, features.chunk(len(alike))))
            if 0 in alike:
                hyper = encoder.hypercolumn([m[:len(crops[0])] for m in maps])
        head = encoder.predictor(encoder.projector(torch.cat([pooled[i] for i in range(len(crops))])))
        hyper = encoder.hyper_predictor(encoder.hyper_projector(hyper))
        return F.normalize(head, dim=1).chunk(len(crops)), F.normalize(hyper, dim=1)

    def loss(self, views, processes=1):
        """Of the whole batch, of which each process sees a part; batch statistics are those of its part."""
        self.keys = dict.fromkeys(self.banks, torch.empty(0))
        parts = zip(*(view.chunk(processes) for view in views))
        return sum(self._loss(*part) for part in parts) / processes

    def _loss(self, weak, *crops):
        with torch.no_grad():
            (key_g,), key_h = self.embed(self.teacher, weak)
        for name, keys in (('global', key_g), ('hyper', key_h)):
            self.keys[name] = torch.cat([self.keys[name], keys])
        target_g = distribution(key_g, self.banks['global'], TAU['teacher'])
        target_h = distribution(key_h, self.banks['hyper'], TAU['hyper'])
        queries, query_h = self.embed(self.student, *crops)
        align_gh = sum(cross_entropy(distribution(q, self.banks['global'], TAU['student']), target_h) for q in queries)
        align_hg = cross_entropy(distribution(query_h, self.banks['hyper'], TAU['hyper']), target_g)
        relation = align_gh / len(queries) + align_hg
        contrast = info_nce(queries[0], key_g, self.banks['global']) + info_nce(query_h, key_h, self.banks['hyper'])
        progress = min(1, self.step / WARMUP)
        return progress * 0.5 * relation + (1 - progress) * contrast

    def update(self):
        """Plain SGD, Eq. 7, first in first out."""
        with torch.no_grad():
            for p in self.student.parameters():
                p -= LR * p.grad
                p.grad = None
            students = dict(self.student.named_parameters())
            for name, p in self.teacher.named_parameters():
                p.copy_(MOMENTUM * p + (1 - MOMENTUM) * students[name])
            for name, keys in self.keys.items():
                for i, key in enumerate(keys):
                    self.banks[name][(self.step * len(keys) + i) % BANK] = key
        self.step += 1


def descend(task):
    """The optimiser's and the teacher's part of a step."""
    with torch.no_grad():
        for p in task.student.parameters():
            p -= LR * p.grad
            p.grad = None
    task.update_ema()


def trained_state(task):
    return dict(
        student=dict(task.student.named_parameters()),
        teacher=dict(task.teacher.named_parameters()),
        banks={name: bank.embeddings for name, bank in task.banks.items()},
    )


def check_equal(state, reference):
    for part, expected in (('student', dict(reference.student.named_parameters())),
                           ('teacher', dict(reference.teacher.named_parameters())), ('banks', reference.banks)):
        assert state[part].keys() == expected.keys()
        for name, value in state[part].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10, msg=f'{part} {name}')


@pytest.mark.parametrize('predictor,sizes', [
    (False, (32, 32)),
    (True, (32, 32)),
    (False, (32, 32, 24, 16)),
    (True, (32, 32, 24, 24)),
])
def test_five_steps_equal_the_float64_reference(predictor, sizes):
    task = build(predictor)
    reference = Reference(task)
    for step in range(STEPS):
        views = draw_views(step, sizes)
        loss, expected = task(views)['loss'], reference.loss(views)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10) and math.isfinite(expected.item())
        loss.backward()
        expected.backward()
        gradients = dict(reference.student.named_parameters())
        for name, p in task.student.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name].grad, rtol=1e-8, atol=1e-10, msg=name)
        descend(task)
        reference.update()
    check_equal(trained_state(task), reference)


def train_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    task = build(predictor=True).prepare_distributed()
    for step in range(STEPS):
        task([view.chunk(2)[rank] for view in draw_views(step)])['loss'].backward()
        descend(task)
    torch.save(trained_state(task), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_equal_the_float64_reference(tmp_path):
    mp.start_processes(train_rank, (str(tmp_path),), nprocs=2, start_method='forkserver')
    reference = Reference(build(predictor=True))
    for step in range(STEPS):
        reference.loss(draw_views(step), processes=2).backward()
        reference.update()
    for rank in range(2):
        check_equal(torch.load(tmp_path / f'{rank}.pt'), reference)
