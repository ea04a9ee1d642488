"""kNN accuracy of a backbone while it trains."""
import argparse
from typing import Any, Dict, Optional

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.utils import is_primary
from torch.utils.data import Dataset

from timm_cgh.data import is_stream

from .extract import extract_distributed
from .features import Pixels, create_eval_loader, extract_features
from .knn import best_knn, knn_accuracy

__all__ = ['KnnMonitor']


class KnnMonitor:
    """kNN top-1 (k in 10, 20, 100, 200, the best; Sec. 4.2) of a plain timm model on two fixed sets of images.

    All processes must call it: they share the images. Of streams, which cannot be shared, the first process reads all.

    Args:
        reference: labelled images to search, (PIL image, target) items
        query: labelled images to classify
        data_config: timm's `input_size`, `mean`, `std`, `interpolation`
        args: `batch_size`, `workers`, `amp`, `amp_dtype`, `channels_last`, `distributed`, `world_size`, `rank`
        device: of the models
    """

    def __init__(
            self,
            reference: Dataset,
            query: Dataset,
            data_config: Dict[str, Any],
            args: argparse.Namespace,
            device: torch.device,
    ):
        self.sets = reference, query
        self.data_config = data_config
        self.args = args
        self.device = device

    def __call__(self, model: nn.Module) -> Optional[float]:
        """Best top-1 in percent; None on all processes but the first.

        The model's modes and the random state are as before afterwards. Of several processes, all judge the first one's
        running statistics (which DDP gives them in the next step anyway).
        """
        if self.args.distributed:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        return self._judge(model, self.args)

    def pixels(self) -> Optional[float]:
        """The same for the raw pixels (at most 32 x 32), the yardstick that a representation must beat."""
        raw = Pixels(self.data_config['mean'], self.data_config['std']).to(self.device)
        return self._judge(raw, argparse.Namespace(**{**vars(self.args), 'amp': False}))

    def _judge(self, model: nn.Module, args: argparse.Namespace) -> Optional[float]:
        features = [self._extract(model, images, args) for images in self.sets]
        return best_knn(knn_accuracy(*features[0], *features[1]))[1] if is_primary(args) else None

    def _extract(self, model: nn.Module, images: Dataset, args: argparse.Namespace) -> Any:
        if not is_stream(images):
            return extract_distributed(model, images, self.data_config, args, self.device, name_unreadable=False)
        if not is_primary(args):
            return None
        loader = create_eval_loader(
            images, self.data_config, batch_size=args.batch_size, workers=args.workers, device=self.device)
        amp_dtype = getattr(torch, args.amp_dtype) if args.amp else None
        return extract_features(model, loader, self.device, amp_dtype, args.channels_last)
