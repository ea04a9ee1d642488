"""Student and momentum teacher behind the interface of a timm training task."""
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.task import TrainingTask

__all__ = ['MomentumTask', 'spread']


def spread(embeddings: torch.Tensor) -> torch.Tensor:
    """Standard deviation of (B, D) unit rows over the batch, sqrt(1 - |mean|^2)."""
    return (1 - embeddings.mean(dim=0).square().sum()).clamp(min=0).sqrt()


class MomentumTask(TrainingTask):
    """Base of self-supervised tasks: a student and, optionally, a momentum teacher; subclasses add the loss.

    `student.backbone` is a plain timm model at all times; DDP holds a reference to the student (`trainable_module`). In
    a checkpoint, `state_dict` is that plain backbone's, and `task_state` is everything else.

    The teacher's normalisation layers run on batch statistics and keep their own running ones (buffers are not
    averaged); its dropout and stochastic depth are off.

    Args:
        student: module to train, with a timm model as `backbone`
        teacher: follows the student's parameters of the same names
        momentum: m of Eq. 7
        **kwargs: `device`, `dtype`, `verbose` of `timm.task.TrainingTask`

    Raises:
        ValueError: momentum outside [0, 1]
    """

    def __init__(self, student: nn.Module, teacher: Optional[nn.Module] = None, momentum: float = 0.999, **kwargs: Any):
        super().__init__(**kwargs)
        if not 0 <= momentum <= 1:
            raise ValueError(f'momentum must lie in [0, 1], got {momentum}')
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.momentum = momentum
        self.num_updates = 0
        self._ddp: Tuple[nn.Module, ...] = ()  # in a tuple, so that the student is not registered twice
        self._ema_pairs: Optional[Tuple[List[torch.Tensor], List[torch.Tensor]]] = None
        # LeViT and others cache what they derive from parameters in eval mode until a mode is set: stale after updates
        self._teacher_caches = teacher is not None and any(
            type(m).train is not nn.Module.train for m in teacher.modules())

    @property
    def trainable_module(self) -> nn.Module:
        """The student, wrapped in DDP after `prepare_distributed`."""
        return self._ddp[0] if self._ddp else self.student

    def train(self, mode: bool = True) -> 'MomentumTask':
        """Set the mode; of the teacher only the normalisation layers follow (no dropout in targets)."""
        super().train(mode)
        self._set_teacher_mode(mode)
        return self

    def _set_teacher_mode(self, mode: bool) -> None:
        if self.teacher is None:
            return
        self.teacher.eval()
        for module in self.teacher.modules():
            if getattr(module, 'running_mean', None) is not None or getattr(module, 'running_var', None) is not None:
                module.train(mode)

    def convert_sync_batchnorm(self) -> 'MomentumTask':
        """Synchronise batch statistics over processes, in student and teacher; before `prepare_distributed`."""
        self.student = convert_sync_batchnorm(self.student)
        if self.teacher is not None:
            self.teacher = convert_sync_batchnorm(self.teacher)
        return self.train(self.training)

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs) -> 'MomentumTask':
        """Wrap the student in DDP and broadcast rank 0's teacher and banks. Collective: every rank must call."""
        with torch.no_grad():
            for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
                if not name.startswith('student.'):
                    dist.broadcast(tensor, src=0)
        self._ddp = (nn.parallel.DistributedDataParallel(self.student, device_ids=device_ids, **ddp_kwargs),)
        return self

    def compile(self, **kwargs: Any) -> nn.Module:
        """Compile the forward of both encoders in place: names, checkpoints and `student.backbone` stay plain."""
        for encoder in (self.student, self.teacher):
            if encoder is not None:
                encoder.compile(**kwargs)
        return self.student.backbone

    @property
    def eval_model(self) -> nn.Module:
        """The plain timm model that timm's `get_eval_model` gives; the teacher is no EMA model in timm's sense."""
        return self.student.backbone

    @torch.no_grad()
    def update_ema(self, step: Optional[int] = None) -> None:
        """Eq. 7, on parameters: teacher <- m teacher + (1 - m) student.

        Args:
            step: optimiser updates so far, including this one; by default one more than before
        """
        if self.teacher is not None:
            if self._ema_pairs is None:
                teachers = dict(self.teacher.named_parameters())
                students = dict(self.student.named_parameters())
                self._ema_pairs = list(teachers.values()), [students[name] for name in teachers]
            torch._foreach_lerp_(*self._ema_pairs, 1 - self.momentum)
            if self._teacher_caches:
                self._set_teacher_mode(self.training)
        self.num_updates = self.num_updates + 1 if step is None else step

    def get_task_state(self, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """All state except the student's backbone: the student's heads, teacher, number of updates."""
        heads = {k: v for k, v in self.student.state_dict().items() if not k.startswith('backbone.')}
        state = {'heads': heads, 'num_updates': self.num_updates}
        return state if self.teacher is None else {**state, 'teacher': self.teacher.state_dict()}

    def load_task_state(self, state: Any, strict: bool = True, *args: Any, **kwargs: Any) -> None:
        """Load what `get_task_state` returned.

        Raises:
            RuntimeError: the state is of another model, method, context or bank size
        """
        if state is None:
            raise RuntimeError('no task_state: a checkpoint of a plain model, not of a CGH pre-training run')
        missing, unexpected = self.student.load_state_dict(state['heads'], strict=False)
        missing = [k for k in missing if not k.startswith('backbone.')]
        if strict and (missing or unexpected):
            raise RuntimeError(f'heads do not fit: missing {missing}, unexpected {unexpected}')
        if self.teacher is not None:
            self.teacher.load_state_dict(state['teacher'], strict=strict)
        self.num_updates = state['num_updates']
