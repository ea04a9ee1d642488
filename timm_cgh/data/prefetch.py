"""Batches of uint8 views on the CPU -> normalised views on the training device."""
from typing import Iterable, Iterator, List, Sequence, Tuple, Union

import torch

from .augment import photometric
from .loader import Batch

__all__ = ['ViewsToDevice']


class ViewsToDevice:
    """Copies a batch to the training device, and augments (photometric changes) and normalises it there.

    Args:
        mean, std: per channel, of pixels in [0, 1]
        device: the training device
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: Union[str, torch.device]):
        self.device = torch.device(device)
        self.mean = torch.tensor(mean, device=self.device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(1, -1, 1, 1)
        # one for all epochs: cuBLAS keeps a workspace (32 MiB on an H100) for every stream that it was used on
        self.stream = torch.cuda.Stream(self.device) if self.device.type == 'cuda' else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> List[torch.Tensor]:
        """Per view (B, C, H, W) float32, normalised."""
        return [
            photometric(view.to(self.device, non_blocking=True), params, self.mean, self.std)
            for view, params in zip(batch.views, batch.params)
        ]

    def to_pixels(self, view: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) uint8 on the CPU: what a view looks like."""
        pixels = (view * self.std + self.mean).clamp(0, 1) * 255
        return pixels.round().byte().permute(0, 2, 3, 1).cpu()

    def prefetch(self, loader: Iterable[Batch]) -> Iterator[Tuple[Batch, List[torch.Tensor]]]:
        """Yield each batch with its views; on a GPU the next ones are copied and augmented while these are in use."""
        if self.stream is None:
            for batch in loader:
                yield batch, self(batch)
            return
        ready = None
        for batch in loader:
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)  # the step before last may still read the memory that these views reuse
            with torch.cuda.stream(self.stream):
                views = self(batch)
            if ready is not None:
                yield ready
            current.wait_stream(self.stream)
            ready = batch, views
        if ready is not None:
            yield ready
