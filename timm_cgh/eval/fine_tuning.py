"""Fine-tuning a whole backbone with a classifier: the epochs, and the state that they change."""
import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_cgh.errors import checking
from timm_cgh.optim import fill_momentum, load_optimizer
from timm_cgh.progress import Progress

from .backbone import Backbone
from .classifier import as_classifier, top_accuracy
from .crops import CropLoader
from .features import FeatureExtractor, Features
from .linear import LinearHeads

__all__ = ['FineTuning', 'create_classifier']


def create_classifier(
        backbone: Backbone,
        num_classes: int,
        extractor: FeatureExtractor,
        seed: int = 42,
        no_sync_bn: bool = False,
) -> nn.Module:
    """The backbone with a new classifier as one timm model, trainable, on the device.

    Args:
        backbone: see `as_classifier`
        num_classes: of the classifier
        extractor: says on which device and in which memory format
        seed: of the classifier's weights
        no_sync_bn: keep the batch statistics of each GPU apart

    Raises:
        InputError: see `as_classifier`
    """
    with checking('model', backbone.name, ValueError):
        start = LinearHeads(backbone.model.head_hidden_size, num_classes, [1.0], seed=seed)
        classifier = as_classifier(backbone.model, start.weights[0], start.biases[0], backbone.data_config)
    classifier = extractor.prepare(classifier.requires_grad_(True))
    if extractor.process.distributed and extractor.process.device.type == 'cuda' and not no_sync_bn:
        classifier = convert_sync_batchnorm(classifier)
    return classifier


@dataclass
class FineTuning:
    """A classifier in training.

    Args:
        classifier: timm model on the device, of which DDP gets a wrapper
        loader: labelled crops
        extractor: evaluates, and says how the images are laid out and with which precision
        optimizer: of the classifier
        scheduler: timm's, by epochs or by updates
        epochs: of the run
        seed: of the model's own randomness
        smoothing: of the labels
        val_interval: epochs between evaluations, 0 for one at the end only
        log_interval: batches between lines of the log
    """

    classifier: nn.Module
    loader: CropLoader
    extractor: FeatureExtractor
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    _: KW_ONLY
    epochs: int
    seed: int = 42
    smoothing: float = 0.0
    val_interval: int = 1
    log_interval: int = 50

    def __post_init__(self) -> None:
        process = self.extractor.process
        fill_momentum(self.optimizer)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=self.extractor.amp_dtype is torch.float16)
        self.model = self.classifier
        if process.distributed:
            device_ids = [process.device] if process.device.type == 'cuda' else None
            self.model = DistributedDataParallel(self.classifier, device_ids=device_ids)

    def state_dict(self) -> Dict[str, Any]:
        """What a checkpoint needs; the schedule is a function of the epoch."""
        return dict(
            classifier=self.classifier.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
        )

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.classifier.load_state_dict(state['classifier'])
        load_optimizer(self.optimizer, state['optimizer'])
        if state['scaler']:  # of a run in float16
            self.scaler.load_state_dict(state['scaler'])

    def evaluate(self, val: Dataset, warn_unreadable: bool = True) -> Features:
        """(N, C) logits of a data set, as features. Collective: every rank must call."""
        return self.extractor(nn.Sequential(self.classifier), val, warn_unreadable)

    def run(self, val: Dataset, start_epoch: int = 0) -> Iterator[Tuple[Dict[str, Any], Optional[Features]]]:
        """Train the epochs that are left. Collective: every rank must iterate.

        Args:
            val: data set to evaluate on
            start_epoch: first epoch

        Yields:
            row of `summary.csv` after each epoch, whose `train_loss` may not be finite; logits, where it was evaluated
        """
        process, evaluated = self.extractor.process, False
        for epoch in range(start_epoch, self.epochs):
            self.scheduler.step(epoch)
            with logging_redirect_tqdm():
                row: Dict[str, Any] = {'epoch': epoch, 'train_loss': self.train_one_epoch(epoch)}
            if process.distributed:  # each process has its own batch statistics where they are not synchronised
                distribute_bn(self.classifier, process.world_size, reduce=True)
            outputs = None
            last = epoch + 1 == self.epochs or (self.val_interval and (epoch + 1) % self.val_interval == 0)
            if last and math.isfinite(row['train_loss']):
                outputs = self.evaluate(val, warn_unreadable=not evaluated)
                evaluated = True
                row['eval_top1'], row['eval_top5'] = top_accuracy(outputs.features, outputs.labels)
            yield row, outputs

    def train_one_epoch(self, epoch: int) -> float:
        """Returns the mean loss."""
        extractor, process, steps = self.extractor, self.extractor.process, len(self.loader)
        total, seen = torch.zeros((), device=process.device), 0
        self.model.train()
        progress = Progress(epoch, self.epochs, 0, steps, self.loader.sampler.block, silent=not process.primary)
        for batch, (images, labels, count) in enumerate(progress.waiting(self.loader.epoch(epoch))):
            self.scheduler.step_update(epoch * steps + batch)
            # the model's own randomness (dropout, stochastic depth) by step and process, also after a resume
            torch.manual_seed(hash((self.seed, epoch * steps + batch, process.rank)))
            with torch.autocast(
                    process.device.type, dtype=extractor.amp_dtype, enabled=extractor.amp_dtype is not None):
                logits = self.model(images.to(memory_format=extractor.memory_format))
            loss = F.cross_entropy(logits.float(), labels, reduction='sum', label_smoothing=self.smoothing)
            # DDP averages over the processes: each gives its part of the mean over the whole batch
            share = loss * (process.world_size / count)
            self.scaler.scale(share).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            total, seen = total + loss.detach(), seen + count
            progress.bar.update()
            if (batch + 1) % self.log_interval == 0 or batch + 1 == steps:
                mean = total.item() * process.world_size / seen
                progress.report(batch + 1, mean, self.optimizer.param_groups[-1]['lr'])
        progress.bar.close()
        if process.distributed:
            dist.all_reduce(total)
        return total.item() / seen
