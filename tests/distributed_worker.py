"""Some steps of training on given images by one process or several, whose state is written down.

tests/distributed_worker.py OUT MODEL shuffle|plain|norms STEPS
"""
import os
import sys

import torch
import torch.distributed as dist
import torch.nn as nn

from timm_cgh import create_task
from timm_cgh.task.positives import RelationTracker, Selection, relation_columns
from timm_cgh.train.meter import Meter


def main(out, model, mode, steps):
    torch.set_num_threads(1)
    world = int(os.environ.get('WORLD_SIZE', 1))
    rank = int(os.environ.get('RANK', 0))
    torch.manual_seed(rank)  # processes start apart: prepare_distributed must bring them together
    task = create_task(
        model,
        bank_size=50,  # no multiple of the batch
        hidden_dim=32,
        embed_dim=16,
        momentum=0.9,
        contrast_warmup=10,
        hyper_norm_layer=nn.BatchNorm2d if mode == 'norms' else nn.Identity,
        shuffle_bn=mode == 'shuffle',
        bank_labels=True,
    )
    tracker = RelationTracker(Selection(2.0), {'global': 0.04, 'hyper': 0.08})
    meter = Meter()
    if world > 1:
        dist.init_process_group('gloo')
        task.prepare_distributed()
    optimizer = torch.optim.SGD(task.student.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(2, 8, 3, 32, 32, generator=generator).chunk(world, dim=1)[rank]
        target = torch.randint(3, (8,), generator=generator).chunk(world)[rank]
        result = task(list(views), target, observe=tracker if step % 2 else None)
        meter.update(result)
        loss = result['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    torch.save({
        'losses': losses,
        'student': task.student.state_dict(),
        'teacher': dict(task.teacher.named_parameters()),
        'banks': {k: bank.embeddings for k, bank in task.banks.items()},
        'labels': {k: bank.labels for k, bank in task.banks.items()},
        'relations': relation_columns(meter.read()),
    }, f'{out}-{world}-{rank}.pt')
    if world > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
