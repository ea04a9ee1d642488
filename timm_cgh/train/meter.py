"""Running averages of a step's scalars, without waiting for the device."""
from typing import Any, Dict, Tuple

import torch
from timm.utils import reduce_tensor

from timm_cgh.distributed import is_distributed, world_size

__all__ = ['Meter']


class Meter:
    """Averages of scalars that stay on their device until they are read.

    A step adds one vector; names may come and go between steps (`loss_nce` ends with the warm-up), each is averaged
    over the steps that had it.
    """

    def __init__(self):
        self.sums: Dict[Tuple[str, ...], torch.Tensor] = {}
        self.counts: Dict[Tuple[str, ...], int] = {}

    @torch.no_grad()
    def update(self, scalars: Dict[str, torch.Tensor]) -> None:
        names = tuple(scalars)
        values = torch.stack([v.detach() for v in scalars.values()])
        self.sums[names] = self.sums[names] + values if names in self.sums else values
        self.counts[names] = self.counts.get(names, 0) + 1

    def _averaged_sums(self) -> Dict[Tuple[str, ...], torch.Tensor]:
        """The sums, averaged over the processes. Collective: every rank must call."""
        if not is_distributed():
            return self.sums
        return {names: reduce_tensor(sums, world_size()) for names, sums in self.sums.items()}

    def read(self) -> Dict[str, float]:
        """name -> mean over steps and processes; waits for the device. Collective: every rank must call."""
        totals: Dict[str, float] = {}
        steps: Dict[str, int] = {}
        for names, sums in self._averaged_sums().items():
            for name, value in zip(names, sums.tolist()):
                totals[name] = totals.get(name, 0.0) + value
                steps[name] = steps.get(name, 0) + self.counts[names]
        return {name: totals[name] / steps[name] for name in totals}

    def state_dict(self) -> Dict[str, Any]:
        """Sums that every rank can continue from. Collective: every rank must call."""
        return {'sums': [(list(names), sums.cpu()) for names, sums in self._averaged_sums().items()],
                'counts': [(list(names), count) for names, count in self.counts.items()]}

    def load_state_dict(self, state: Dict[str, Any], device: torch.device) -> None:
        """
        Raises:
            KeyError, TypeError, ValueError: not a state of a meter
        """
        self.sums = {tuple(names): sums.to(device, copy=True) for names, sums in state['sums']}
        self.counts = {tuple(names): int(count) for names, count in state['counts']}
        if self.sums.keys() != self.counts.keys() or any(s.shape != (len(names),) for names, s in self.sums.items()):
            raise ValueError('the sums of the meter do not fit their names')
