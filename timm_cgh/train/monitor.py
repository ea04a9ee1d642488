"""Evaluation of a backbone while it trains: kNN accuracy with labels, measures of quality without."""
from dataclasses import dataclass, replace
from typing import Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from timm.utils import distribute_bn
from torch.utils.data import Dataset

from timm_cgh.data import ViewLoader, ViewsToDevice, is_stream
from timm_cgh.eval.features import FeatureExtractor, Pixels, extract_features
from timm_cgh.eval.knn import best_knn, knn_accuracy, one_shot_accuracy
from timm_cgh.eval.loader import create_eval_loader
from timm_cgh.eval.quality import alignment, rankme, uniformity

__all__ = ['Accuracy', 'KnnMonitor', 'QualityMonitor']


class Accuracy(NamedTuple):
    """Top-1 in percent."""
    knn: float  # by weighted kNN, the best of k in 10, 20, 100, 200 (Sec. 4.2)
    one_shot: float  # by the nearest of one labelled image per class, see `one_shot_accuracy`


class KnnMonitor:
    """kNN accuracy of a plain timm model on two fixed sets of images.

    Collective: every rank must call, as the images are shared among them. Streams cannot be shared: rank 0 reads them.

    Args:
        reference: labelled images to search, (PIL image, target) items
        query: labelled images to classify
        extractor: of the features
    """

    def __init__(self, reference: Dataset, query: Dataset, extractor: FeatureExtractor):
        self.sets = reference, query
        self.extractor = extractor
        self.named = False  # whether the unreadable images have been logged

    def __call__(self, model: nn.Module) -> Optional[Accuracy]:
        """The accuracy; None on all ranks but 0.

        The model's modes and the random state are unchanged afterwards. Every rank uses rank 0's running statistics
        (which DDP broadcasts in the next step anyway).
        """
        if self.extractor.process.distributed:
            distribute_bn(model, self.extractor.process.world_size)
        return self._accuracy(model, self.extractor)

    def pixels(self) -> Optional[Accuracy]:
        """The same with raw pixels (at most 32 x 32) as features: a baseline."""
        extractor = replace(self.extractor, amp_dtype=None)
        config = extractor.data_config
        return self._accuracy(Pixels(config['mean'], config['std']).to(extractor.process.device), extractor)

    def _accuracy(self, model: nn.Module, extractor: FeatureExtractor) -> Optional[Accuracy]:
        reference, query = (self._extract(model, images, extractor) for images in self.sets)
        self.named = True
        if not extractor.process.primary:
            return None
        return Accuracy(best_knn(knn_accuracy(*reference, *query))[1], one_shot_accuracy(*reference, *query))

    def _extract(
            self,
            model: nn.Module,
            images: Dataset,
            extractor: FeatureExtractor,
    ) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        if not is_stream(images):
            return extractor(model, images, warn_unreadable=not self.named)[:2]
        if not extractor.process.primary:
            return None, None
        e = extractor
        loader = create_eval_loader(images, e.data_config, e.batch_size, e.workers, e.process.device)
        return extract_features(model, loader, e.process.device, e.amp_dtype, e.channels_last)


@dataclass
class QualityMonitor:
    """RankMe, alignment and uniformity (see `timm_cgh.eval.quality`) of a backbone on fixed views of training images.

    Args:
        loader: of the teacher's and the student's full-size view; its first epoch is used
        to_device: see `ViewsToDevice`
        amp_dtype, channels_last: see `extract_features`
    """

    loader: ViewLoader
    to_device: ViewsToDevice
    amp_dtype: Optional[torch.dtype] = None
    channels_last: bool = False

    def __call__(self, model: nn.Module) -> Dict[str, float]:
        """`rankme` and `uniformity` of the teacher's view, `alignment` of it with the student's full-size view."""
        self.loader.set_epoch(0)
        batches = ((torch.cat(self.to_device(batch)), batch.target) for batch in self.loader)
        features, _ = extract_features(model, batches, self.to_device.device, self.amp_dtype, self.channels_last)
        weak, contrastive = features.unflatten(0, (len(self.loader), 2, -1)).transpose(0, 1).flatten(1, 2)
        return dict(rankme=rankme(weak), alignment=alignment(weak, contrastive), uniformity=uniformity(weak))
