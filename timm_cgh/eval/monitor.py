"""kNN accuracy of a backbone while it trains."""
from typing import Any, Dict, Optional, Union

import torch
import torch.nn as nn
from torch.utils.data import Dataset

from .features import Pixels, create_eval_loader, extract_features
from .knn import best_knn, knn_accuracy

__all__ = ['KnnMonitor']


class KnnMonitor:
    """kNN top-1 (k in 10, 20, 100, 200, the best; Sec. 4.2) of a plain timm model on two fixed sets of images.

    Args:
        reference: labelled images to search, (PIL image, target) items
        query: labelled images to classify
        data_config: timm's `input_size`, `mean`, `std`, `interpolation`
        batch_size, workers, device, amp_dtype: of the feature extraction
    """

    def __init__(
            self,
            reference: Dataset,
            query: Dataset,
            data_config: Dict[str, Any],
            batch_size: int = 256,
            workers: int = 0,
            device: Union[str, torch.device] = 'cpu',
            amp_dtype: Optional[torch.dtype] = None,
    ):
        self.loaders = [
            create_eval_loader(dataset, data_config, batch_size=batch_size, workers=workers, device=device)
            for dataset in (reference, query)
        ]
        self.raw = Pixels(data_config['mean'], data_config['std']).to(device)
        self.device = device
        self.amp_dtype = amp_dtype

    def __call__(self, model: nn.Module) -> float:
        """Best top-1 in percent. The model's modes and the random state are as before afterwards."""
        return self._judge(model, self.amp_dtype)

    def pixels(self) -> float:
        """The same for the raw pixels (at most 32 x 32), the yardstick that a representation must beat."""
        return self._judge(self.raw, None)

    def _judge(self, model: nn.Module, amp_dtype: Optional[torch.dtype]) -> float:
        reference, query = (extract_features(model, loader, self.device, amp_dtype) for loader in self.loaders)
        return best_knn(knn_accuracy(*reference, *query))[1]
