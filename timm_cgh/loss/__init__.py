from .contrast import InfoNCELoss
from .cross_context import CONTEXTS, CrossContextLoss
from .relation import info_nce, relation_cross_entropy
