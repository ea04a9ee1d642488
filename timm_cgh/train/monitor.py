"""kNN accuracy of a backbone while it trains."""
import copy
from typing import Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.data import Dataset

from timm_cgh.data import is_stream
from timm_cgh.eval.features import FeatureExtractor, Pixels, extract_features
from timm_cgh.eval.knn import best_knn, knn_accuracy
from timm_cgh.eval.loader import create_eval_loader

__all__ = ['KnnMonitor']


class KnnMonitor:
    """kNN top-1 (k in 10, 20, 100, 200, the best; Sec. 4.2) of a plain timm model on two fixed sets of images.

    Collective: every rank must call, as the images are shared among them. Streams cannot be shared: rank 0 reads them.

    Args:
        reference: labelled images to search, (PIL image, target) items
        query: labelled images to classify
        extractor: of the features
    """

    def __init__(self, reference: Dataset, query: Dataset, extractor: FeatureExtractor):
        self.sets = reference, query
        self.extractor = extractor

    def __call__(self, model: nn.Module) -> Optional[float]:
        """Best top-1 in percent; None on all ranks but 0.

        The model's modes and the random state are unchanged afterwards. Every rank uses rank 0's running statistics
        (which DDP broadcasts in the next step anyway).
        """
        if self.extractor.process.distributed:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        return self._accuracy(model, self.extractor)

    def pixels(self) -> Optional[float]:
        """The same with raw pixels (at most 32 x 32) as features: a baseline."""
        extractor = copy.copy(self.extractor)
        extractor.amp_dtype = None
        config = extractor.data_config
        return self._accuracy(Pixels(config['mean'], config['std']).to(extractor.process.device), extractor)

    def _accuracy(self, model: nn.Module, extractor: FeatureExtractor) -> Optional[float]:
        reference, query = (self._extract(model, images, extractor) for images in self.sets)
        if not extractor.process.primary:
            return None
        return best_knn(knn_accuracy(*reference, *query))[1]

    @staticmethod
    def _extract(
            model: nn.Module,
            images: Dataset,
            extractor: FeatureExtractor,
    ) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        if not is_stream(images):
            return extractor(model, images, warn_unreadable=False)
        if not extractor.process.primary:
            return None, None
        e = extractor
        loader = create_eval_loader(images, e.data_config, e.batch_size, e.workers, e.process.device)
        return extract_features(model, loader, e.process.device, e.amp_dtype, e.channels_last)
