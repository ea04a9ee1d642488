"""One training step of CGH as a timm training task (Fig. 1, Sec. 3)."""
import copy
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.task import TrainingTask

from timm_cgh.layers import MemoryBank
from timm_cgh.loss import Contexts, CrossContextLoss
from timm_cgh.models.encoder import ContextEncoder

__all__ = ['CGHTask']


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(rows: torch.Tensor) -> torch.Tensor:
    """(B, ...) of this process -> (B * world, ...) of all, by rank."""
    if _world_size() == 1:
        return rows
    out = rows.new_empty((len(rows) * _world_size(), *rows.shape[1:]))
    dist.all_gather_into_tensor(out, rows.contiguous())
    return out


class CGHTask(TrainingTask):
    """Student, momentum teacher, memory banks, and what happens between a batch of views and a loss (Sec. 3).

    A training loop calls, per step, `task(views)['loss'].backward()`, the optimiser, then `task.update_ema(step)`.
    `task.student.backbone` is a plain timm model at all times; DDP holds a reference to the student
    (`task.trainable_module`). In a checkpoint, `state_dict` is that plain backbone's, and `task_state` is all the rest.

    The teacher's normalisation layers run on batch statistics and keep their own running ones (buffers are not
    averaged); its dropout and stochastic depth are off.

    Args:
        student: encoder to train
        loss: the objective
        bank_size: embeddings in each memory bank
        momentum: m of Eq. 7
        contrast_warmup: optimiser updates over which InfoNCE gives way to the relation loss, 0 for none
        shuffle_bn: in several processes, shuffle the teacher's batch across them (as MoCo does), so that its batch
            statistics tell nothing about which images went together
        bank_labels: the banks remember the labels that `forward` is given, for its `observe`; the loss never sees them
        device, dtype, verbose: see `timm.task.TrainingTask`

    Raises:
        ValueError: momentum outside [0, 1], a negative warm-up, a bank size below 1, an encoder that does not fit the
            loss
    """

    def __init__(
            self,
            student: ContextEncoder,
            loss: CrossContextLoss,
            bank_size: int = 131072,
            momentum: float = 0.999,
            contrast_warmup: int = 0,
            shuffle_bn: bool = False,
            bank_labels: bool = False,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if not 0 <= momentum <= 1:
            raise ValueError(f'momentum must lie in [0, 1], got {momentum}')
        if contrast_warmup < 0:
            raise ValueError(f'contrast_warmup must not be negative, got {contrast_warmup}')
        if loss.uses_hypercolumn != (student.hypercolumn is not None):
            raise ValueError(f"context '{loss.context}' and the encoder disagree about the hypercolumn")
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.teacher.predictor = nn.Identity()
        if loss.uses_hypercolumn:
            self.teacher.hyper_predictor = nn.Identity()
        self.loss = loss
        names = ('global', 'hyper') if loss.uses_hypercolumn else ('global',)
        self.banks = nn.ModuleDict({name: MemoryBank(bank_size, student.embed_dim, bank_labels) for name in names})
        self.bank_labels = bank_labels
        self.momentum = momentum
        self.contrast_warmup = contrast_warmup
        self.shuffle_bn = shuffle_bn
        self.num_updates = 0
        self._ddp: Tuple[nn.Module, ...] = ()  # in a tuple, so that the student is not registered twice
        self._ema_pairs = None
        # LeViT and others keep what they derive from parameters in eval mode until a mode is set: stale after an update
        self._teacher_caches = any(type(m).train is not nn.Module.train for m in self.teacher.modules())
        self.to(device=self.device, dtype=self.dtype)
        self.train()

    @property
    def trainable_module(self) -> nn.Module:
        """The student, wrapped in DDP after `prepare_distributed`."""
        return self._ddp[0] if self._ddp else self.student

    def train(self, mode: bool = True) -> 'CGHTask':
        """Training mode; of the teacher only what keeps batch statistics follows (no dropout in targets)."""
        super().train(mode)
        self._set_teacher_mode(mode)
        return self

    def _set_teacher_mode(self, mode: bool) -> None:
        self.teacher.eval()
        for module in self.teacher.modules():
            if getattr(module, 'running_mean', None) is not None or getattr(module, 'running_var', None) is not None:
                module.train(mode)

    def convert_sync_batchnorm(self) -> 'CGHTask':
        """Synchronise batch statistics over processes, in student and teacher; before `prepare_distributed`."""
        self.student = convert_sync_batchnorm(self.student)
        self.teacher = convert_sync_batchnorm(self.teacher)
        return self.train(self.training)

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs) -> 'CGHTask':
        """Wrap the student in DDP; teacher and banks become rank 0's everywhere."""
        with torch.no_grad():
            for tensor in [*self.teacher.state_dict().values(), *self.banks.buffers()]:
                dist.broadcast(tensor, src=0)
        self._ddp = (nn.parallel.DistributedDataParallel(self.student, device_ids=device_ids, **ddp_kwargs),)
        return self

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs) -> nn.Module:
        """Compile the forward of both encoders in place: names, checkpoints and `student.backbone` stay plain."""
        for encoder in (self.student, self.teacher):
            encoder.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.student.backbone

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """The student's backbone, a plain timm model. The teacher is no EMA model in timm's sense: `ema` gives None."""
        if module is not None:
            return module
        return None if ema else self.student.backbone

    @property
    def warmup_progress(self) -> float:
        """Share of the InfoNCE warm-up that is over, in [0, 1]."""
        return min(1.0, self.num_updates / self.contrast_warmup) if self.contrast_warmup else 1.0

    @torch.no_grad()
    def update_ema(self, step: Optional[int] = None) -> None:
        """Eq. 7, on parameters: teacher <- m teacher + (1 - m) student.

        Args:
            step: optimiser updates so far, this one included; default one more than before
        """
        if self._ema_pairs is None:
            students = dict(self.student.named_parameters())
            pairs = [(p, students[name]) for name, p in self.teacher.named_parameters()]
            self._ema_pairs = tuple(map(list, zip(*pairs)))
        teachers, students = self._ema_pairs
        torch._foreach_lerp_(teachers, students, 1 - self.momentum)
        if self._teacher_caches:
            self._set_teacher_mode(self.training)
        self.num_updates = self.num_updates + 1 if step is None else step

    @torch.no_grad()
    def _teach(self, weak: torch.Tensor) -> Tuple[Contexts, Contexts]:
        """Weak views of this process -> the teacher's contexts of this process, and of all."""
        world, batch = _world_size(), len(weak)
        if not (self.shuffle_bn and world > 1):
            contexts = self.teacher(weak)
            return contexts, Contexts(*(e if e is None else _gather(e) for e in contexts))
        # all processes draw one permutation: the step is their common seed
        order = torch.randperm(batch * world, generator=torch.Generator().manual_seed(self.num_updates)).to(weak.device)
        mine = slice(dist.get_rank() * batch, (dist.get_rank() + 1) * batch)
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
            views: the weak view and one contrastive view, (B, C, H, W) normalised images each
            target: (B,) labels, -1 unknown: for the banks where they remember labels, else not used
            observe: given the teacher's contexts of this process, target and banks before the embeddings enter them;
                the scalars that it returns join the result

        Returns:
            the scalars of `CrossContextLoss` and `std_global`, `std_hyper`: standard deviation of the student's unit
            embeddings in the batch, sqrt(1 - |mean|^2), 1 for embeddings in all directions, 0 for one point

        Raises:
            ValueError: not exactly two views; banks that remember labels, but no target
        """
        if len(views) != 2:
            raise ValueError(f'expected a weak and a contrastive view, got {len(views)} views')
        weak, contrastive = views
        labels = None
        if self.bank_labels:
            if target is None:
                raise ValueError('the banks remember labels, but there is no target')
            target = target.to(weak.device, non_blocking=True)
            labels = _gather(target)  # by rank, as _teach gives everyone's embeddings whether shuffled or not
        teacher, everyone = self._teach(weak)
        student = self.trainable_module(contrastive)
        result = self.loss(student, teacher, self.banks, self.warmup_progress)
        if observe is not None:
            result.update(observe(teacher, target, self.banks))
        for name, embeddings in zip(self.banks, everyone):
            self.banks[name].enqueue(embeddings, labels)
        with torch.no_grad():
            for name, embeddings in zip(self.banks, student):
                result[f'std_{name}'] = (1 - embeddings.mean(dim=0).square().sum()).clamp(min=0).sqrt()
        return result

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """All state but the student's backbone: the student's heads, teacher, banks, number of updates."""
        heads = {k: v for k, v in self.student.state_dict().items() if not k.startswith('backbone.')}
        return {
            'heads': heads,
            'teacher': self.teacher.state_dict(),
            'banks': self.banks.state_dict(),
            'num_updates': self.num_updates,
        }

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        """Load what `get_task_state` gave.

        Raises:
            RuntimeError: the state is of another model, context or bank size
        """
        if state is None:
            raise RuntimeError('no task_state: a checkpoint of a plain model, not of a CGH pre-training run')
        missing, unexpected = self.student.load_state_dict(state['heads'], strict=False)
        missing = [k for k in missing if not k.startswith('backbone.')]
        if strict and (missing or unexpected):
            raise RuntimeError(f'heads do not fit: missing {missing}, unexpected {unexpected}')
        self.teacher.load_state_dict(state['teacher'], strict=strict)
        self.banks.load_state_dict(state['banks'], strict=strict)
        self.num_updates = state['num_updates']
