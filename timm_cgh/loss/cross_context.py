"""The objective of CGH and of its same-context and global-context variants (Eq. 6, Tab. 5)."""
from typing import Dict, Optional

import torch
import torch.nn as nn

from timm_cgh.layers import MemoryBank
from timm_cgh.models.encoder import Contexts

from .relation import info_nce, relation_cross_entropy

__all__ = ['CONTEXTS', 'CrossContextLoss']

# the student's and the teacher's context, g(lobal) or h(yper), of each relation term
_PAIRS = {'cross': [('g', 'h'), ('h', 'g')], 'same': [('g', 'g'), ('h', 'h')], 'global': [('g', 'g')]}
CONTEXTS = tuple(_PAIRS)


class CrossContextLoss(nn.Module):
    """Eq. 6 and its variants of Tab. 5, with the InfoNCE warm-up of the authors' code.

    - `cross`: CE(y1g, y2h) + CE(y1h, y2g), Eq. 6
    - `same`: CE(y1g, y2g) + CE(y1h, y2h)
    - `global`: CE(y1g, y2g), which is ReSSL

    With w the progress of the warm-up in [0, 1], loss = w * relation_weight * (sum of the relation terms)
    + (1 - w) * (sum of InfoNCE over the contexts in use).

    With multi-crop the relation terms of the student's global context (global-hypercolumn alignment for `cross`) are
    averaged over all crops; the terms of its hypercolumn and InfoNCE see the full-size crop alone, as in the authors'
    code.

    Args:
        context: one of `cross`, `same`, `global`
        temp_student: tau_s, student's global context
        temp_teacher: tau_t, teacher's global context
        temp_hyper: tau_h, hypercolumn context of both (Eq. 1, 4)
        temp_hyper_teacher: the teacher's tau_h, default the student's (the paper has one tau_h for both; with `same`,
            equal temperatures do not sharpen the target)
        relation_weight: factor of each relation term; default 0.5 as in the authors' code, 1 for `global` as in ReSSL's
        contrast_temp: temperature of InfoNCE

    Raises:
        ValueError: an unknown context, a temperature that is not positive, a negative weight
    """

    def __init__(
            self,
            context: str = 'cross',
            temp_student: float = 0.1,
            temp_teacher: float = 0.04,
            temp_hyper: float = 0.08,
            temp_hyper_teacher: Optional[float] = None,
            relation_weight: Optional[float] = None,
            contrast_temp: float = 0.2,
    ):
        super().__init__()
        if context not in CONTEXTS:
            raise ValueError(f'context must be one of {", ".join(CONTEXTS)}, got {context!r}')
        if relation_weight is None:
            relation_weight = 1.0 if context == 'global' else 0.5
        if relation_weight < 0:
            raise ValueError(f'relation_weight must not be negative, got {relation_weight}')
        temps = dict(
            temp_student=temp_student,
            temp_teacher=temp_teacher,
            temp_hyper=temp_hyper,
            temp_hyper_teacher=temp_hyper if temp_hyper_teacher is None else temp_hyper_teacher,
            contrast_temp=contrast_temp,
        )
        for name, value in temps.items():
            if not value > 0:
                raise ValueError(f'{name} must be positive, got {value}')
            setattr(self, name, value)
        self.context = context
        self.uses_hypercolumn = context != 'global'
        self.relation_weight = relation_weight

    def forward(
            self,
            student: Contexts,
            teacher: Contexts,
            banks: Dict[str, MemoryBank],
            progress: float = 1.0,
    ) -> Dict[str, torch.Tensor]:
        """
        Args:
            student: contexts of the contrastive view, with gradient
            teacher: contexts of the weak view
            banks: `global` and, unless the context is `global`, `hyper`: memory banks of one size
            progress: w, the part of the InfoNCE warm-up that is done

        Returns:
            scalars, nats: `loss` (to differentiate) and, detached and unweighted, `loss_gh` and `loss_hg` (cross),
            `loss_gg` and `loss_hh` (same) or `loss_gg` (global), named student context then teacher context;
            `loss_nce` during the warm-up; `entropy_global` and `entropy_hyper`, the mean entropy of the targets from
            the teacher's contexts
        """
        # context -> (embeddings, bank rows, temperature) on either side
        as_student = {'g': (student.global_embed, banks['global'].embeddings, self.temp_student)}
        as_teacher = {'g': (teacher.global_embed, banks['global'].embeddings, self.temp_teacher)}
        if self.uses_hypercolumn:
            as_student['h'] = (student.hyper_embed, banks['hyper'].embeddings, self.temp_hyper)
            as_teacher['h'] = (teacher.hyper_embed, banks['hyper'].embeddings, self.temp_hyper_teacher)

        terms, result = [], {}
        for s, t in _PAIRS[self.context]:
            z, z_bank, z_temp = as_student[s]
            y, y_bank, y_temp = as_teacher[t]
            term, entropy = relation_cross_entropy(z, z_bank, y, y_bank, z_temp, y_temp, return_entropy=True)
            terms.append(term)
            result[f'loss_{s}{t}'] = term.detach()
            result['entropy_global' if t == 'g' else 'entropy_hyper'] = entropy
        loss = progress * self.relation_weight * sum(terms)
        if progress < 1:
            contrast = sum(
                info_nce(z if z.ndim == 2 else z[0], as_teacher[context][0], bank, self.contrast_temp)
                for context, (z, bank, _) in as_student.items())
            loss = loss + (1 - progress) * contrast
            result['loss_nce'] = contrast.detach()
        return {'loss': loss, **result}
