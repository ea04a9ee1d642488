"""One training step of CGH as a timm training task (Fig. 1, Sec. 3)."""
import copy
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist
import torch.nn as nn

from timm_cgh.distributed import world_size
from timm_cgh.layers import MemoryBank, split_batch_norm
from timm_cgh.loss import CrossContextLoss, InfoNCELoss
from timm_cgh.models.encoder import ContextEncoder, Contexts

from .momentum import MomentumTask, spread

__all__ = ['CGHTask']

# the name since torch 2.14, which warns of the former one
_all_gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor


def _gather(rows: torch.Tensor) -> torch.Tensor:
    """(B, ...) of this rank -> (B * world, ...) of all ranks, in their order. Collective: every rank must call."""
    if world_size() == 1:
        return rows
    out = rows.new_empty((len(rows) * world_size(), *rows.shape[1:]))
    _all_gather(out, rows.contiguous())
    return out


class CGHTask(MomentumTask):
    """Student, momentum teacher, memory banks, and the step from a batch of views to a loss (Sec. 3).

    A training loop calls, per step, `task(views)['loss'].backward()`, the optimiser, then `task.update_ema(step)`. With
    `InfoNCELoss` as the loss it is MoCo-v2.

    Args:
        student: encoder to train
        loss: the objective
        bank_size: embeddings in each memory bank
        momentum: m of Eq. 7
        contrast_warmup: optimiser updates over which the relation loss replaces InfoNCE, 0 for none
        shuffle_bn: in several processes, shuffle the teacher's batch across them (MoCo's ShuffleBN), so that batch
            statistics do not reveal which images share a batch
        bn_splits: take the backbone's batch statistics over this many parts of the batch, the teacher's in shuffled
            order: the same effect in a single process (the authors' code uses 8); hypercolumn and heads use the whole
            batch
        bank_labels: store the labels given to `forward` in the banks, for its `observe`; the loss never uses them
        **kwargs: `device`, `dtype`, `verbose` of `timm.task.TrainingTask`

    Raises:
        ValueError: momentum outside [0, 1], a negative warm-up, a bank size or number of splits below 1, or a loss that
            uses a hypercolumn which the encoder lacks (or the reverse)
    """

    teacher: ContextEncoder

    def __init__(
            self,
            student: ContextEncoder,
            loss: Union[CrossContextLoss, InfoNCELoss],
            bank_size: int = 131072,
            momentum: float = 0.999,
            contrast_warmup: int = 0,
            shuffle_bn: bool = False,
            bn_splits: int = 1,
            bank_labels: bool = False,
            **kwargs: Any,
    ):
        if contrast_warmup < 0:
            raise ValueError(f'contrast_warmup must not be negative, got {contrast_warmup}')
        if loss.uses_hypercolumn != (student.hypercolumn is not None):
            raise ValueError(f"context '{loss.context}' and the encoder disagree about the hypercolumn")
        teacher = copy.deepcopy(student)
        teacher.predictor = nn.Identity()
        if loss.uses_hypercolumn:
            teacher.hyper_predictor = nn.Identity()
        if bn_splits != 1:
            for encoder in (student, teacher):
                split_batch_norm(encoder.backbone, bn_splits)
        super().__init__(student, teacher, momentum, **kwargs)
        self.loss = loss
        names = ('global', 'hyper') if loss.uses_hypercolumn else ('global',)
        self.banks = nn.ModuleDict({name: MemoryBank(bank_size, student.embed_dim, bank_labels) for name in names})
        self.bank_labels = bank_labels
        self.contrast_warmup = contrast_warmup
        self.shuffle_bn = shuffle_bn
        self.bn_splits = bn_splits
        self.to(device=self.device, dtype=self.dtype)
        self.train()

    @property
    def warmup_progress(self) -> float:
        """Share of the InfoNCE warm-up that is over, in [0, 1]."""
        return min(1.0, self.num_updates / self.contrast_warmup) if self.contrast_warmup else 1.0

    @torch.no_grad()
    def _teach(self, weak: torch.Tensor) -> Tuple[Contexts, Contexts]:
        """Weak views of this rank -> the teacher's contexts of this rank, and of all ranks."""
        world, batch = world_size(), len(weak)
        if self.bn_splits == 1 and not (self.shuffle_bn and world > 1):
            contexts = self.teacher(weak)
            return contexts, Contexts(*(e if e is None else _gather(e) for e in contexts))
        # all ranks draw the same permutation: the step is their common seed
        order = torch.randperm(batch * world, generator=torch.Generator().manual_seed(self.num_updates))
        if weak.is_cuda:
            order = order.pin_memory()  # for an asynchronous copy
        order = order.to(weak.device, non_blocking=True)
        rank = dist.get_rank() if world > 1 else 0
        mine = slice(rank * batch, (rank + 1) * batch)
        contexts = self.teacher(_gather(weak)[order[mine]])
        back = order.argsort()
        everyone = Contexts(*(e if e is None else _gather(e)[back] for e in contexts))
        return Contexts(*(e if e is None else e[mine] for e in everyone)), everyone

    def forward(
            self,
            views: Sequence[torch.Tensor],
            target: Optional[torch.Tensor] = None,
            observe: Optional[Callable[..., Dict[str, torch.Tensor]]] = None,
    ) -> Dict[str, torch.Tensor]:
        """One step up to the loss; the teacher's embeddings then enter the banks.

        Args:
            views: the teacher's weak view, the student's contrastive view, and the student's further crops (multi-crop)
                of any sizes; (B, C, H, W) normalised images each
            target: (B,) labels, -1 unknown; only used where the banks store labels
            observe: called with the teacher's contexts of this rank, the target and the banks before they are updated;
                the scalars that it returns are added to the result

        Returns:
            the scalars of the loss and `std_global`, `std_hyper`: standard deviation over the batch of the student's
            unit embeddings of the full-size view, sqrt(1 - |mean|^2): 1 for all directions alike, 0 for one point

        Raises:
            ValueError: fewer than two views, or no target for banks that store labels
        """
        if len(views) < 2:
            raise ValueError(f'expected a weak and at least one contrastive view, got {len(views)} views')
        weak, contrastive, *crops = views
        labels = None
        if self.bank_labels:
            if target is None:
                raise ValueError('the banks store labels, but there is no target')
            target = target.to(weak.device, non_blocking=True)
            labels = _gather(target)  # by rank, as _teach gives everyone's embeddings whether shuffled or not
        teacher, everyone = self._teach(weak)
        student = self.trainable_module(contrastive, *crops)
        result = self.loss(student, teacher, self.banks, self.warmup_progress)
        if observe is not None:
            result.update(observe(teacher, target, self.banks))
        for name, embeddings in zip(self.banks, everyone):
            self.banks[name].enqueue(embeddings, labels)
        with torch.no_grad():
            for name, embeddings in zip(self.banks, student):
                result[f'std_{name}'] = spread(embeddings[0] if embeddings.ndim == 3 else embeddings)
        return result

    def get_task_state(self, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """All state except the student's backbone: the student's heads, teacher, banks, number of updates."""
        return {**super().get_task_state(), 'banks': self.banks.state_dict()}

    def load_task_state(self, state: Any, strict: bool = True, *args: Any, **kwargs: Any) -> None:
        super().load_task_state(state, strict)
        self.banks.load_state_dict(state['banks'], strict=strict)
