"""CGH: self-supervised pre-training of timm backbones. Importing registers the project's models with timm."""
import os

# On a CPU, OpenMP threads that wait for each other spin; beside data workers they would starve one another. Read when
# torch is loaded.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

from .layers import Hypercolumn, MemoryBank
from .loss import CrossContextLoss, info_nce, relation_cross_entropy
from .models import ContextEncoder, Contexts
from .task import CGHTask, create_task
from .train.pretrain import Result, pretrain

__version__ = '0.2.0.dev0'
