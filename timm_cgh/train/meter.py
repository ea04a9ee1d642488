"""Running averages of a step's scalars, without waiting for the device."""
from typing import Dict, Tuple

import torch
import torch.distributed as dist

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

    def read(self) -> Dict[str, float]:
        """name -> mean over steps and processes; waits for the device. In DDP, every process must call."""
        totals: Dict[str, float] = {}
        steps: Dict[str, int] = {}
        for names, sums in self.sums.items():
            if dist.is_available() and dist.is_initialized():
                sums = sums.clone()
                dist.all_reduce(sums)
                sums /= dist.get_world_size()
            for name, value in zip(names, sums.tolist()):
                totals[name] = totals.get(name, 0.0) + value
                steps[name] = steps.get(name, 0) + self.counts[names]
        return {name: totals[name] / steps[name] for name in totals}

    def state_dict(self) -> dict:
        return {'sums': [(list(k), v.cpu()) for k, v in self.sums.items()],
                'counts': [(list(k), v) for k, v in self.counts.items()]}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.sums = {tuple(k): v.to(device) for k, v in state['sums']}
        self.counts = {tuple(k): v for k, v in state['counts']}
