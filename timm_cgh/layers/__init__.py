from .heads import Predictor, Projector
from .hypercolumn import Hypercolumn
from .memory_bank import MemoryBank
