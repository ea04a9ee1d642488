"""One run of `train.py`: what happens around its steps and epochs."""
import logging
import math
import os
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import NativeScaler

from timm_cgh.arguments import arguments_of
from timm_cgh.data import ViewLoader, ViewsToDevice, is_stream
from timm_cgh.distributed import Process, all_gather_objects
from timm_cgh.errors import checking
from timm_cgh.eval.loader import eval_crop_pct
from timm_cgh.files import Summary, epochs_done
from timm_cgh.models.export import export_backbone
from timm_cgh.progress import Progress, peak_memory
from timm_cgh.task import MomentumTask
from timm_cgh.task.positives import RelationTracker, relation_columns

from .boards import Boards
from .build import Backbone
from .checkpoint import RunSaver
from .meter import Meter
from .monitor import KnnMonitor, QualityMonitor
from .outputs import (
    describe_epoch, list_files, warn_if_collapsed, write_neighbours, write_plots, write_settings, write_views)
from .resume import ResumePoint, check_ranks_agree, is_within, restore
from .stop import StopRequest

__all__ = ['Run', 'Step']

_logger = logging.getLogger('train')


class Step(NamedTuple):
    """One batch of an epoch.

    Args:
        batch: its index in the epoch
        views: per view (B, C, H, W) normalised images on the device
        target: (B,) labels, -1 unknown
        group_size: batches whose gradients are accumulated with this one, itself included
        update: whether the optimiser steps after this batch
        logged: whether the losses are logged after this batch
    """
    batch: int
    views: List[torch.Tensor]
    target: torch.Tensor
    group_size: int
    update: bool
    logged: bool


@dataclass
class Run:
    """State of a run, and its bookkeeping: resume, progress, evaluation, checkpoints, files.

    Args:
        given: the options as the user gave them, for `args.yaml` and checkpoints
        settings: the settled options (see `settle`)
        folder: of the run
        backbone, task, loader, to_device, optimizer, scheduler, scaler: the parts of the training step
        data_config: size and normalisation of the images
        images, fingerprint: number of the training images, and what tells them from others
        monitor, quality, tracker: evaluation with labels, without, and of the teacher's relations
    """
    given: Dict[str, Any]
    settings: Any
    folder: str
    process: Process
    stop: StopRequest
    backbone: Backbone
    task: MomentumTask
    loader: ViewLoader
    to_device: ViewsToDevice
    optimizer: torch.optim.Optimizer
    scheduler: Optional[Scheduler]
    scaler: Optional[NativeScaler]
    data_config: Dict[str, Any]
    images: int
    fingerprint: str
    monitor: Optional[KnnMonitor]
    quality: Optional[QualityMonitor]
    tracker: Optional[RelationTracker]

    def __post_init__(self) -> None:
        self.epoch, self.batch, self.meter = 0, 0, Meter()
        self.knn: Optional[float] = None
        self.knn_before: Optional[float] = None
        self.knn_pixels: Optional[float] = None
        self.one_shot: Dict[str, float] = {}
        self.unreadable: Set[str] = set()
        self.finished, self.exit_code = True, 0
        self.saver = RunSaver(
            self.task,
            self.given,
            optimizer=self.optimizer,
            amp_scaler=self.scaler,
            checkpoint_dir=self.folder,
            recovery_dir=self.folder,
            max_history=self.settings.checkpoint_hist,
        )

    @property
    def order(self) -> Dict[str, Any]:
        """What the order of the images depends on: within an epoch, a checkpoint is good for this order alone."""
        return dict(
            images=self.fingerprint,
            seed=self.settings.seed,
            steps=len(self.loader),
            batch_size=self.settings.batch_size,
            world_size=self.process.world_size,
            grad_accum_steps=self.settings.grad_accum_steps,
        )

    # ---- beginning

    def resume(self, point: Optional[ResumePoint]) -> None:
        """Continue from a checkpoint, where there is one. Collective: every rank must call.

        Raises:
            InputError: the checkpoint does not fit this run, or is not that of the other ranks
        """
        check_ranks_agree(point)
        if point is None:
            return
        restore(point, self.task, self.optimizer, self.scaler)
        progress = point.progress
        self.epoch, self.batch = point.position
        self.knn, self.knn_before, self.knn_pixels = (progress.get(f'knn{name}') for name in ('', '_before', '_pixels'))
        self.one_shot = progress.get('one_shot', {})
        saved = progress.get('order', {})
        if self.batch and any(saved[name] != value for name, value in self.order.items() if name in saved):
            _logger.warning(f'{point.path} was saved with another order of the images: epoch {self.epoch} starts over')
            self.batch = 0
        # schedules depend on the position in the run, whatever number of updates an epoch had before
        updates_per_epoch = math.ceil(len(self.loader) / self.settings.grad_accum_steps)
        self.task.num_updates = self.epoch * updates_per_epoch + self.batch // self.settings.grad_accum_steps
        if self.batch:
            with checking('resume', point.path, KeyError, TypeError, ValueError):
                self.meter.load_state_dict(progress['meter'], self.process.device)
        if self.process.primary and is_within(point.path, self.folder):
            self.saver.restore(point.state, point.path, point.rewind)
            self._keep_checkpoint()
        _logger.info(f'Resumed {point.path} at epoch {self.epoch}, batch {self.batch}')
        if self.epoch >= self.settings.epochs:
            _logger.info(f'This run is finished: it has all of its {self.settings.epochs} epochs')

    def begin(self) -> None:
        """Open the run's files and evaluate the backbone before training. Collective: every rank must call."""
        if self.scheduler is not None:
            self.scheduler.step_update(self.task.num_updates)
        self.summary = Summary(os.path.join(self.folder, 'summary.csv'), self.epoch)
        if self.process.primary:
            resolved = write_settings(
                self.folder, self.given, vars(self.settings), images=self.images, **self.data_config,
                device=str(self.process.device), processes=self.process.world_size)
            if self.epoch == self.batch == 0 and not is_stream(self.loader.loader.dataset):
                write_views(self.folder, self.loader, self.to_device)
            self.boards = Boards(self.folder, resolved, **arguments_of(Boards, self.settings))
        if self.monitor is not None:
            if self.knn_pixels is None and (pixels := self.monitor.pixels()) is not None:
                self.knn_pixels, self.one_shot['pixels'] = pixels
            if self.epoch == self.batch == 0 and (before := self.monitor(self.task.student.backbone)) is not None:
                self.knn, self.one_shot['before'] = before
                self.knn_before = self.knn
            if self.process.primary:
                untrained = '' if self.knn_before is None else f', backbone before training {self.knn_before:.2f} %'
                _logger.info(f'kNN top-1: raw pixels {self.knn_pixels:.2f} %{untrained}')
        self.saver.progress = dict(
            epoch=0, batch=0, knn=self.knn, knn_before=self.knn_before, knn_pixels=self.knn_pixels,
            one_shot=self.one_shot, order=self.order, bank_size=self.settings.bank_size)
        self.stop.defer()

    def epochs_left(self) -> Iterator[int]:
        """Epochs from where the run stands, until the last one or a request to stop."""
        first = self.epoch
        while self.finished and self.epoch < self.settings.epochs:
            if self.epoch > first and self.stop.agreed(self.process.device):
                self._stop()
                return
            yield self.epoch

    # ---- steps

    def steps(self, epoch: int) -> Iterator[Step]:
        """Batches of an epoch from where the run stands."""
        count, accum = len(self.loader), self.settings.grad_accum_steps
        self.loader.set_epoch(epoch, self.batch)
        self.progress = Progress(
            epoch, self.settings.epochs, self.batch, count, self.settings.batch_size * self.process.world_size,
            silent=not self.process.primary)
        batches = self.progress.waiting(self.loader)  # without the augmentation, which more workers do not speed up
        for i, (batch, views) in enumerate(self.to_device.prefetch(batches), start=self.batch):
            self._note_unreadable(batch.unreadable)
            # The model's own randomness (dropout, stochastic depth) is a function of step and rank: a resumed run draws
            # what the uninterrupted one would have drawn.
            torch.manual_seed(hash((self.settings.seed, epoch * count + i, self.process.rank)))
            group_start = i // accum * accum
            group_size = min(accum, count - group_start)
            update = i + 1 == group_start + group_size
            logged = (i + 1) % self.settings.log_interval == 0 or i + 1 == count
            yield Step(i, views, batch.target, group_size, update, logged)

    def record(self, step: Step, result: Dict[str, torch.Tensor]) -> bool:
        """Count a step: averages, progress, recovery checkpoint; False where the run must end now."""
        self.meter.update(result)
        self.batch = step.batch + 1
        self.progress.bar.update()
        loss = result['loss']  # of this process: only rank 0 may have a terminal, and to read the meter is collective
        if step.logged and not self._finite(loss := self.meter.read()['loss']):
            return False
        if step.logged or (self.progress.start == step.batch and not self.progress.bar.disable):
            self.progress.report(self.batch, float(loss), self.optimizer.param_groups[0]['lr'], self.knn)
        if not step.update or self.batch == len(self.loader):
            return True
        if self.stop.due(self.settings.log_interval) and self.stop.agreed(self.process.device):
            if self._save_recovery():
                self._stop()
            return False
        if self.settings.recovery_interval and self.batch % self.settings.recovery_interval < step.group_size:
            return self._save_recovery()
        return True

    def _note_unreadable(self, names: List[str]) -> None:
        for name in names:
            if name not in self.unreadable:
                self.unreadable.add(name)
                if len(self.unreadable) <= 100:  # the number is logged at the end
                    _logger.warning(f'Unreadable image skipped: {name} ({len(self.unreadable)} so far)')

    def _finite(self, loss: float) -> bool:
        """Whether the mean loss is; if not, the run ends."""
        if math.isfinite(loss):
            return True
        if self.process.primary:  # the folder may be on its own disk
            saved = any(name.endswith('.pth.tar') for name in os.listdir(self.folder))
            _logger.error(
                f'The loss is not finite in epoch {self.epoch}: stopped. '
                f"{f'The last good state is in {self.folder}' if saved else 'No state was saved yet'}; a lower "
                f'learning rate, gradient clipping or bfloat16 in place of float16 may help.')
        self.finished, self.exit_code = False, 1
        return False

    def _save_recovery(self) -> bool:
        if not self._finite(self.meter.read()['loss']):  # never replace a good checkpoint by a broken state
            return False
        meter = self.meter.state_dict()
        if self.process.primary:
            self.saver.progress.update(epoch=self.epoch, batch=self.batch, knn=self.knn, meter=meter)
            self.saver.save_recovery(self.epoch, self.batch)
        return True

    def _stop(self) -> None:
        self.finished, self.exit_code = False, 128 + self.stop.signum

    # ---- ends

    def end_epoch(self) -> None:
        """Evaluate, write the epoch's row, checkpoint and export. Collective: every rank must call."""
        self.progress.bar.close()
        if not self.finished:
            return
        epoch, last = self.epoch, self.epoch + 1 == self.settings.epochs
        rate, wait = self.progress.images_per_second(self.batch), self.progress.data_wait
        row: Dict[str, Any] = {
            'epoch': epoch,
            **{f'train_{name}': value for name, value in relation_columns(self.meter.read()).items()},
            'train_images_per_s': round(rate, 1),
            'train_data_wait': round(wait, 1),
        }
        if math.isfinite(memory := peak_memory(self.process.device)):
            row['train_peak_memory_mib'] = round(memory)
        knn = None
        if self.settings.knn_interval and (last or (epoch + 1) % self.settings.knn_interval == 0):
            if self.monitor is not None and (knn := self.monitor(self.task.student.backbone)) is not None:
                self.knn, self.one_shot['after'] = knn
                row.update(eval_knn=round(knn.knn, 3), eval_one_shot=round(knn.one_shot, 3))
            if self.quality is not None and self.process.primary:
                quality = self.quality(self.task.student.backbone)
                row.update({f'eval_{name}': float(f'{value:.5g}') for name, value in quality.items()})
        row['lr'] = self.optimizer.param_groups[0]['lr']
        self.epoch, self.batch, self.meter = epoch + 1, 0, Meter()
        if not self.process.primary:
            return
        if epoch + 1 > max(self.settings.warmup_epochs, self.settings.contrast_warmup_epochs):
            warn_if_collapsed(row, self.settings.bank_size)
        self.summary.add(row)  # before the checkpoint: a resumed run finds the rows of all epochs that it skips
        self.saver.progress.update(epoch=epoch + 1, batch=0, knn=self.knn, meter=None)
        self.saver.save_checkpoint(epoch, metric=None if knn is None else knn.knn)
        self._keep_checkpoint()
        if not last:  # the export of a run that is killed is as new as its checkpoint
            self._export()
        _logger.info(describe_epoch(row))
        self.boards.log(row)

    def _keep_checkpoint(self) -> None:
        interval = self.settings.checkpoint_interval
        if interval and self.epoch and not self.batch and self.epoch % interval == 0:
            self.saver.save_milestone(self.epoch)

    def _export(self) -> None:
        """Write the backbone as it is now, a plain timm model with the tag `<method>_<epochs>ep`, to `export/`."""
        method = f'cgh_{self.settings.context}' if self.settings.method == 'cgh' else self.settings.method
        export_backbone(
            self.backbone.module,
            os.path.join(self.folder, 'export'),
            **self.data_config,
            crop_pct=eval_crop_pct(min(self.data_config['input_size'][1:])),
            tag=f'{method}_{epochs_done(self.summary.rows)}ep',
            model_kwargs=self.backbone.model_kwargs,
        )

    def finish(self) -> None:
        """Write the export and the plots, log what the run left.

        Collective: every rank must call.
        """
        if self.process.primary:
            self.boards.close()
        if self.exit_code == 1:
            return
        unreadable = set().union(*all_gather_objects(self.unreadable))
        if not self.process.primary:
            return
        self._export()
        if self.monitor is None and self.quality is not None and self.data_config['input_size'][0] in (1, 3):
            sample = self.quality.loader.loader.dataset.dataset
            write_neighbours(self.folder, sample, self.task.student.backbone, self.data_config, self.process.device)
        baselines = {'kNN, before training': self.knn_before, 'kNN, raw pixels': self.knn_pixels}
        selection = None if self.tracker is None else self.tracker.selection
        write_plots(self.folder, self.task, self.summary.rows, baselines, selection)
        if not self.finished:
            _logger.info(f'Stopped by {self.stop.name}; the state is saved, --resume auto continues {self.folder}')
        elif None not in (self.knn, self.knn_before, self.knn_pixels):
            _logger.info(
                f'kNN top-1: {self.knn_before:.2f} % before, {self.knn:.2f} % after training; raw pixels '
                f'{self.knn_pixels:.2f} %')
            if len(self.one_shot) == 3:
                _logger.info(
                    'One labelled image per class: {before:.2f} % before, {after:.2f} % after training; raw pixels '
                    '{pixels:.2f} % (nearest of them, mean of 20 draws)'.format(**self.one_shot))
        if unreadable:
            _logger.warning(f'{len(unreadable)} unreadable images were skipped')
        _logger.info(f"Files in {self.folder}: {', '.join(list_files(self.folder))}")
        export = os.path.join(self.folder, 'export')
        _logger.info(f"Load the backbone: timm.create_model('local-dir:{export}', pretrained=True)")
