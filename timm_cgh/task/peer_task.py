"""Student, teacher and step of a method of two symmetric views; what the views are worth is its criterion's business."""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .momentum import MomentumTask

__all__ = ['Outputs', 'PeerEncoder', 'PeerTask']

Outputs = Sequence[Tuple[torch.Tensor, torch.Tensor]]  # (projection, prediction) of either view


class PeerEncoder(nn.Module):
    """timm backbone, projector, and what the student has beyond it.

    Args:
        backbone: plain timm model
        projector: (B, d) -> (B, D)
        predictor: (B, D) -> (B, D'), None for none
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: Optional[nn.Module] = None):
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor

    def forward(self, *views: torch.Tensor) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """Per view, projection and prediction (the projection again where there is no predictor); float32."""
        result = []
        for view in views:
            projection = self.projector(self.backbone(view)).float()
            prediction = projection if self.predictor is None else self.predictor(projection).float()
            result.append((projection, prediction))
        return result


class PeerTask(MomentumTask):
    """A method of two symmetric views.

    Args:
        student: gives (projection, prediction) of each view
        criterion: the student's outputs and the teacher's projections of both views (None without a teacher) -> loss
        state: modules of the criterion with buffers (a centre, a bank) that a checkpoint must hold
        teacher: for the methods that have one
        momentum: m of Eq. 7
        device: see `timm.task.TrainingTask`
    """

    def __init__(
            self,
            student: PeerEncoder,
            criterion: Callable[[Outputs, Optional[List[torch.Tensor]]], torch.Tensor],
            state: Sequence[nn.Module] = (),
            teacher: Optional[PeerEncoder] = None,
            momentum: float = 0.999,
            device: Optional[torch.device] = None,
    ):
        super().__init__(student, teacher, momentum, device=device)
        self.criterion = criterion
        self.state = nn.ModuleList(state)
        self.to(device=self.device, dtype=self.dtype)
        self.train()

    def forward(
            self,
            views: Sequence[torch.Tensor],
            target: Optional[torch.Tensor] = None,
            observe: Optional[Callable] = None,
    ) -> Dict[str, torch.Tensor]:
        """One step up to the loss.

        Args:
            views: two contrastive views, (B, C, H, W) normalised images each
            target, observe: not used

        Returns:
            `loss` and `std_global`, of the first view's projections (see `CGHTask.forward`)

        Raises:
            ValueError: not two views
        """
        if len(views) != 2:
            raise ValueError(f'expected two contrastive views, got {len(views)}')
        targets = None
        if self.teacher is not None:
            with torch.no_grad():
                targets = [projection for projection, _ in self.teacher(*views)]
        outputs = self.trainable_module(*views)
        with torch.autocast(views[0].device.type, enabled=False):
            loss = self.criterion(outputs, targets)
        with torch.no_grad():
            mean = F.normalize(outputs[0][0], dim=1).mean(dim=0)
            return {'loss': loss, 'std_global': (1 - mean.square().sum()).clamp(min=0).sqrt()}

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """All state but the student's backbone."""
        # not state_dict(): lightly's bank keeps itself out of it
        return {**super().get_task_state(module, ema), 'criterion': dict(self.state.named_buffers())}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        super().load_task_state(state, strict, module, ema)
        for name, buffer in self.state.named_buffers():
            buffer.copy_(state['criterion'][name])
