from .heads import Predictor, Projector
from .hypercolumn import Hypercolumn
from .memory_bank import MemoryBank
from .split_batch_norm import split_batch_norm
