"""Relation cross-entropy (Eq. 1-5) and InfoNCE against a memory bank, as pure functions.

Both have their gradient in the forward pass: with z a student embedding, Q its bank, t its temperature, s the softmax
of z Q^T / t and p the target, dL/dz = (s - p) Q / t. Rows of the batch are independent, so the work goes chunk by chunk
and nothing of the size (batch, bank) outlives its chunk; autograd keeps one (B, D) gradient. A chunk goes over the bank
in tiles that fit the processor's cache, once for the products with the bank's rows and the sums of their exponentials,
once for the gradient. Softmax over the bank is float32 (or float64 where the embeddings are), whatever autocast says.
"""
from typing import Iterator, List, Tuple

import torch

__all__ = ['info_nce', 'relation_cross_entropy']

# Values of all (chunk, bank) matrices: enough rows that matrix products are fast and the bank is read from memory few
# times, few enough to leave the memory to the network.
_CHUNK_VALUES_CPU = 2 ** 25
_CHUNK_VALUES_GPU = 2 ** 27
_CHUNK_ROWS_CPU = 256
# Values of one (chunk, tile) matrix on a CPU: a pass over 2 MB takes a fraction of one over the whole matrix. A GPU
# would rather have few large kernels.
_TILE_VALUES_CPU = 2 ** 19


def _row_chunks(batch: int, bank: int, matrices: int, device: torch.device) -> Iterator[slice]:
    """Parts of the batch, for `matrices` of (rows, bank) that are held at a time."""
    on_cpu = device.type == 'cpu'
    rows = max(16, (_CHUNK_VALUES_CPU if on_cpu else _CHUNK_VALUES_GPU) // (matrices * max(bank, 1)))
    rows = min(rows, _CHUNK_ROWS_CPU) if on_cpu else rows
    return (slice(start, min(start + rows, batch)) for start in range(0, batch, rows))


def _tiles(bank: torch.Tensor, rows: int) -> Tuple[torch.Tensor, ...]:
    return bank.split(max(1, _TILE_VALUES_CPU // rows) if bank.device.type == 'cpu' else max(1, len(bank)))


class _TiledSoftmax:
    """Softmax of rows whose logits come tile by tile: exponentials relative to each tile's own maximum, until all are
    known.
    """

    def __init__(self):
        self.exps: List[torch.Tensor] = []
        self.peaks: List[torch.Tensor] = []
        self.sums: List[torch.Tensor] = []

    def add(self, logits: torch.Tensor) -> torch.Tensor:
        """Next (rows, tile) logits, which are overwritten; gives their exponentials."""
        peak = logits.amax(dim=1, keepdim=True)
        self.exps.append(logits.sub_(peak).exp_())
        self.peaks.append(peak)
        self.sums.append(logits.sum(dim=1, keepdim=True))
        return logits

    def finish(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """-> (rows, 1) logsumexp; (tiles, rows, 1) factors that make the exponentials of a tile probabilities."""
        peaks = torch.stack(self.peaks)
        peak = peaks.amax(dim=0)
        relative = (peaks - peak).exp_()
        total = (torch.stack(self.sums) * relative).sum(dim=0)
        return total.log() + peak, relative / total


def check_inputs(temp: float, *pairs: Tuple[torch.Tensor, torch.Tensor]) -> None:
    """Raise `ValueError` for a temperature that is not positive, and pairs that are not (B, D) and (K, D)."""
    if not temp > 0:
        raise ValueError(f'a temperature must be positive, got {temp}')
    for embeddings, bank in pairs:
        if embeddings.ndim != 2 or bank.ndim != 2 or embeddings.shape[1] != bank.shape[1]:
            shapes = tuple(embeddings.shape), tuple(bank.shape)
            raise ValueError(f'embeddings and bank must be (B, D) and (K, D), got {shapes[0]} and {shapes[1]}')


def working_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 where all tensors have it, else float32."""
    return torch.float64 if all(t.dtype == torch.float64 for t in tensors) else torch.float32


class _RelationCrossEntropy(torch.autograd.Function):
    """-> (loss, mean entropy of the target); only the student receives a gradient."""

    @staticmethod
    def forward(ctx, student, student_bank, teacher, teacher_bank, student_temp, teacher_temp):
        with torch.autocast(student.device.type, enabled=False):
            dtype = working_dtype(student, student_bank, teacher, teacher_bank)
            z, z_bank = student.to(dtype), student_bank.to(dtype)
            t, t_bank = teacher.to(dtype), teacher_bank.to(dtype)
            batch = len(t)
            z = z.reshape(-1, batch, z.shape[-1])  # (n, B, D)
            needs_grad = ctx.needs_input_grad[0]
            grad = torch.empty_like(z if needs_grad else z[:0])
            losses = z.new_empty(z.shape[:2])
            entropies = z.new_empty(batch)
            for rows in _row_chunks(batch, len(z_bank), 1 + len(z), z.device):
                zs, ts = z[:, rows].flatten(0, 1) / student_temp, t[rows] / teacher_temp
                count = len(ts)
                target, prediction = _TiledSoftmax(), _TiledSoftmax()
                moments, crosses = [], []
                z_tiles = _tiles(z_bank, max(len(zs), count))
                for z_tile, t_tile in zip(z_tiles, t_bank.split(len(z_tiles[0]))):
                    logits = ts @ t_tile.T  # (b, D) @ (D, tile) -> (b, tile): Eq. 1, 4
                    p = target.add(logits.clone())
                    moments.append(torch.linalg.vecdot(p, logits))
                    logits = zs @ z_tile.T  # (n b, tile): Eq. 2, 4
                    # of several views of the same images, which have one target
                    crosses.append(torch.linalg.vecdot(p, logits.view(-1, *p.shape)))
                    prediction.add(logits)
                t_total, p_scale = target.finish()
                z_total, s_scale = prediction.finish()
                weights = p_scale.squeeze(2)  # (tiles, b)
                entropies[rows] = t_total.squeeze(1) - (torch.stack(moments) * weights).sum(dim=0)
                # Eq. 3, 5: -sum p log s
                losses[:, rows] = z_total.view(-1, count) - (torch.stack(crosses, dim=1) * weights).sum(dim=1)
                if needs_grad:
                    gradient = torch.zeros_like(zs)
                    tiles = zip(z_tiles, target.exps, prediction.exps, p_scale, s_scale)
                    for z_tile, p, s, p_factor, s_factor in tiles:
                        s.mul_(s_factor).view(-1, *p.shape).addcmul_(p, p_factor, value=-1)  # s - p
                        gradient.addmm_(s, z_tile)  # (n b, tile) @ (tile, D) -> (n b, D)
                    grad[:, rows] = gradient.view(-1, count, z.shape[2])
            if needs_grad:
                ctx.save_for_backward(grad.div_(student_temp * losses.numel()).view_as(student))
            ctx.input_dtype = student.dtype
            entropy = entropies.mean()
            ctx.mark_non_differentiable(entropy)
            return losses.mean(), entropy

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad, = ctx.saved_tensors
        return (grad * grad_loss).to(ctx.input_dtype), None, None, None, None, None


def relation_cross_entropy(
        student: torch.Tensor,
        student_bank: torch.Tensor,
        teacher: torch.Tensor,
        teacher_bank: torch.Tensor,
        student_temp: float,
        teacher_temp: float,
        return_entropy: bool = False,
):
    """Cross-entropy between two similarity distributions over a memory bank (Eq. 1-5).

    CE(y1, y2) = -sum_k y2[k] log y1[k] with y1 = softmax(student student_bank^T / student_temp) and
    y2 = softmax(teacher teacher_bank^T / teacher_temp). Teacher and banks are constants: only the student gets a
    gradient.
    Row k of both banks must come from the same image.

    Args:
        student: (B, D) unit rows, or (n, B, D) of n views of each image, which share the target
        student_bank: (K, D) unit rows of the student's context
        teacher: (B, D') unit rows
        teacher_bank: (K, D') unit rows of the teacher's context
        student_temp: temperature of the prediction
        teacher_temp: temperature of the target
        return_entropy: give the mean entropy of the targets (nats, at most ln K) as well

    Returns:
        scalar, mean over batch and views in nats; with `return_entropy` the pair (loss, entropy)

    Raises:
        ValueError: a temperature that is not positive, or shapes that do not fit
    """
    check_inputs(student_temp, (student[0] if student.ndim == 3 else student, student_bank))
    check_inputs(teacher_temp, (teacher, teacher_bank))
    if student.shape[-2] != len(teacher) or len(student_bank) != len(teacher_bank):
        raise ValueError(
            f'student and teacher must agree in batch ({student.shape[-2]}, {len(teacher)}) and in bank size '
            f'({len(student_bank)}, {len(teacher_bank)})')
    loss, entropy = _RelationCrossEntropy.apply(
        student, student_bank, teacher.detach(), teacher_bank, student_temp, teacher_temp)
    return (loss, entropy) if return_entropy else loss


class _InfoNCE(torch.autograd.Function):

    @staticmethod
    def forward(ctx, query, key, bank, temp):
        with torch.autocast(query.device.type, enabled=False):
            dtype = working_dtype(query, key, bank)
            q, k, negatives = query.to(dtype), key.to(dtype), bank.to(dtype)
            batch = len(q)
            needs_grad = ctx.needs_input_grad[0]
            grad = torch.empty_like(q if needs_grad else q[:0])
            losses = q.new_empty(batch)
            for rows in _row_chunks(batch, len(negatives), 1, q.device):
                scaled = q[rows] / temp
                positive = torch.linalg.vecdot(scaled, k[rows]).unsqueeze(1)
                prediction = _TiledSoftmax()
                tiles = _tiles(negatives, len(scaled))
                for tile in tiles:
                    prediction.add(scaled @ tile.T)  # (b, D) @ (D, tile) -> (b, tile)
                rest, scale = prediction.finish()
                losses[rows] = torch.nn.functional.softplus(rest - positive).squeeze(1)  # all else against the positive
                if needs_grad:
                    gradient = torch.zeros_like(scaled)
                    for tile, s, factor in zip(tiles, prediction.exps, scale):
                        gradient.addmm_(s.mul_(factor), tile)
                    # the negatives' share of the probability: exact where the positive's is near 1
                    grad[rows] = (gradient - k[rows]) * (rest - positive).sigmoid()
            if needs_grad:
                ctx.save_for_backward(grad.div_(temp * batch))
            ctx.input_dtype = query.dtype
            return losses.mean()

    @staticmethod
    def backward(ctx, grad_loss):
        grad, = ctx.saved_tensors
        return (grad * grad_loss).to(ctx.input_dtype), None, None, None


def info_nce(query: torch.Tensor, key: torch.Tensor, bank: torch.Tensor, temp: float) -> torch.Tensor:
    """InfoNCE with one positive and the memory bank as negatives (MoCo; here the warm-up of the relation loss).

    -log(exp(q k / t) / (exp(q k / t) + sum_j exp(q n_j / t))). Key and bank are constants.

    Args:
        query: (B, D) unit rows of the student, or (n, B, D) of n views of each image
        key: (B, D) unit rows of the teacher for the same images
        bank: (K, D) unit rows, the negatives
        temp: temperature t

    Returns:
        scalar, mean over batch and views in nats

    Raises:
        ValueError: a temperature that is not positive, or shapes that do not fit
    """
    if query.ndim == 3:
        query, key = query.flatten(0, 1), key.repeat(len(query), 1)
    check_inputs(temp, (query, bank), (key, bank))
    if query.shape != key.shape:
        raise ValueError(f'query {tuple(query.shape)} and key {tuple(key.shape)} must have one shape')
    return _InfoNCE.apply(query, key.detach(), bank, temp)
