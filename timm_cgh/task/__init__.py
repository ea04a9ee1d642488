from .cgh import CGHTask
from .factory import BASELINES, create_task
from .momentum import MomentumTask
