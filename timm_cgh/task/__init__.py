from .cgh import CGHTask
from .factory import create_task
from .meter import Meter
from .portable import TASK_FILE, local_checkpoint, write_portable
from .saver import RunSaver, find_resume, read_checkpoint
