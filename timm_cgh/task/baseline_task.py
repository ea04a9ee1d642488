"""Training task of methods with two symmetric views; the criterion is the method's own."""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_cgh.models.encoder import ContextEncoder

from .momentum import MomentumTask, spread

__all__ = ['BaselineEncoder', 'BaselineTask', 'Outputs']

Outputs = Sequence[Tuple[torch.Tensor, torch.Tensor]]  # (projection, prediction) of either view


class BaselineEncoder(nn.Module):
    """timm backbone, projector and optional predictor.

    Args:
        backbone: plain timm model
        projector: (B, d) -> (B, D)
        predictor: (B, D) -> (B, D')
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: Optional[nn.Module] = None):
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor

    def forward(self, *views: torch.Tensor) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """(projection, prediction) of each view, float32; without a predictor the projection is both."""
        result = []
        for view in views:
            projection = self.projector(self.backbone(view)).float()
            prediction = projection if self.predictor is None else self.predictor(projection).float()
            result.append((projection, prediction))
        return result

    no_weight_decay = ContextEncoder.no_weight_decay


class BaselineTask(MomentumTask):
    """A method that learns from two views of each image alike.

    Args:
        student: gives (projection, prediction) of each view
        criterion: (student outputs, teacher projections of both views or None without a teacher) -> loss
        state: modules of the criterion whose buffers (a centre, a bank) belong in a checkpoint
        teacher: for the methods that have one
        momentum: m of Eq. 7
        **kwargs: see `MomentumTask`
    """

    def __init__(
            self,
            student: BaselineEncoder,
            criterion: Callable[[Outputs, Optional[List[torch.Tensor]]], torch.Tensor],
            state: Sequence[nn.Module] = (),
            teacher: Optional[BaselineEncoder] = None,
            momentum: float = 0.999,
            **kwargs: Any,
    ):
        super().__init__(student, teacher, momentum, **kwargs)
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
        """One step up to the loss of two contrastive views, (B, C, H, W) normalised images each.

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
            return {'loss': loss, 'std_global': spread(F.normalize(outputs[0][0], dim=1))}

    def get_task_state(self, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """All state but the student's backbone."""
        # not state_dict(): lightly's bank is not part of it
        return {**super().get_task_state(), 'criterion': dict(self.state.named_buffers())}

    def load_task_state(self, state: Any, strict: bool = True, *args: Any, **kwargs: Any) -> None:
        super().load_task_state(state, strict)
        for name, buffer in self.state.named_buffers():
            buffer.copy_(state['criterion'][name])
