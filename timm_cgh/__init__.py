"""CGH: self-supervised pre-training of timm backbones. Importing registers the project's models with timm."""
from .layers import Hypercolumn, MemoryBank
from .loss import CrossContextLoss, info_nce, relation_cross_entropy
from .models import ContextEncoder, Contexts
from .task import CGHTask, create_task
from .train.pretrain import Result, pretrain

__version__ = '0.2.0.dev0'
