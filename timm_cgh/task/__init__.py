from .cgh import CGHTask
from .factory import create_task
from .meter import Meter
from .saver import RunSaver, find_resume, read_checkpoint
