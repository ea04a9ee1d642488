from .contrast import ContrastLoss
from .cross_context import CONTEXTS, Contexts, CrossContextLoss
from .relation import info_nce, relation_cross_entropy
