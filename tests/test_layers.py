import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_cgh import Hypercolumn, MemoryBank
from timm_cgh.layers import Predictor, Projector, split_batch_norm


def naive_bank(size, dim, batches, start):
    rows, position = start.clone(), 0
    for batch in batches:
        for row in batch:
            rows[position] = row
            position = (position + 1) % size
    return rows


@pytest.mark.parametrize('size,batches', [(10, [3, 3, 3, 3, 3]), (4, [9, 1, 2]), (7, [7, 7]), (5, [0, 1, 12]), (1,
                                                                                                                [2])])
def test_bank_wraps_around_for_any_batch_size(size, batches):
    bank = MemoryBank(size, 6)
    start = bank.embeddings.clone()
    data = [torch.randn(n, 6) for n in batches]
    for batch in data:
        bank.enqueue(batch)
    assert torch.equal(bank.embeddings, naive_bank(size, 6, data, start))


def test_bank_starts_with_unit_vectors_and_is_written_in_place():
    bank = MemoryBank(100, 8)
    torch.testing.assert_close(bank.embeddings.norm(dim=1), torch.ones(100))
    pointer = bank.embeddings.data_ptr()
    bank.enqueue(torch.randn(33, 8))
    assert bank.embeddings.data_ptr() == pointer


def test_bank_state_dict_carries_the_position():
    bank, other = MemoryBank(10, 4), MemoryBank(10, 4)
    bank.enqueue(torch.randn(7, 4))
    other.load_state_dict(bank.state_dict())
    batch = torch.randn(6, 4)
    bank.enqueue(batch)
    other.enqueue(batch)
    assert torch.equal(bank.embeddings, other.embeddings)


@pytest.mark.parametrize('position', [-1, 10, 10 ** 12, float('nan')])
def test_bank_refuses_a_position_beyond_its_end(position):
    state = {**MemoryBank(10, 4).state_dict(), '_extra_state': torch.tensor(position)}
    with pytest.raises(ValueError, match='position in a bank of 10'):
        MemoryBank(10, 4).load_state_dict(state)


@pytest.mark.parametrize('size,dim', [(0, 4), (4, 0), (-1, 4)])
def test_empty_bank_is_refused(size, dim):
    with pytest.raises(ValueError, match='at least 1'):
        MemoryBank(size, dim)


def test_bank_refuses_rows_of_another_width():
    with pytest.raises(ValueError, match='width 4'):
        MemoryBank(10, 4).enqueue(torch.randn(2, 5))


def test_hypercolumn_is_resize_concatenate_mix_average():
    maps = [torch.randn(3, 5, 8, 8), torch.randn(3, 7, 4, 4)]
    hypercolumn = Hypercolumn([5, 7], 6).train()
    stack = torch.cat([F.interpolate(maps[0], size=(4, 4), mode='bilinear', align_corners=False), maps[1]], dim=1)
    mixed = torch.einsum('bchw,dc->bdhw', stack, hypercolumn.conv.weight[:, :, 0, 0])
    mixed = (mixed - mixed.mean((0, 2, 3), keepdim=True)) / (mixed.var((0, 2, 3), unbiased=False,
                                                                       keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(hypercolumn(maps), mixed.relu().mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_hypercolumn_without_norm_treats_images_alone():
    maps = [torch.randn(3, 5, 8, 8), torch.randn(3, 7, 4, 4)]
    hypercolumn = Hypercolumn([5, 7], 6, norm_layer=nn.Identity)
    torch.testing.assert_close(hypercolumn(maps)[:1], hypercolumn([m[:1] for m in maps]))


def test_hypercolumn_without_maps_is_refused():
    with pytest.raises(ValueError, match='at least one map'):
        Hypercolumn([], 8)


def test_heads_have_the_papers_shape():
    projector, predictor = Projector(2048), Predictor()
    assert [type(m) for m in projector] == [nn.Linear, nn.ReLU, nn.Linear]
    assert (projector[0].out_features, projector[2].out_features) == (4096, 512)
    assert predictor(projector(torch.randn(2, 2048))).shape == (2, 512)


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, lambda width: timm.layers.BatchNormAct2d(width)])
def test_split_batch_norm_normalises_parts_and_moves_running_statistics_as_far(norm):
    torch.manual_seed(0)
    whole = norm(6)
    split = copy.deepcopy(whole)
    split_batch_norm(split, 4)
    assert split.state_dict().keys() == whole.state_dict().keys() and isinstance(copy.deepcopy(split), type(split))
    x = torch.randn(8, 6, 5, 5) * 3 + 1
    alone = copy.deepcopy(whole)
    torch.testing.assert_close(split(x), torch.cat([alone(part) for part in x.split(2)]))
    for _ in range(200):
        whole(x), split(x)
    torch.testing.assert_close(split.running_mean, whole.running_mean, atol=0.05, rtol=0)
    torch.testing.assert_close(split.eval()(x), whole.eval()(x), atol=0.1, rtol=0)
    one, many = norm(6), norm(6)
    split_batch_norm(many, 4)
    one(torch.ones(8, 6, 5, 5)), many(torch.ones(8, 6, 5, 5))
    torch.testing.assert_close(many.running_mean, one.running_mean)
    with pytest.raises(ValueError, match='already'):
        split_batch_norm(many, 2)
    with pytest.raises(ValueError, match='at least 1'):
        split_batch_norm(norm(6), 0)
