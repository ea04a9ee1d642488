from .cgh import CGHTask
from .factory import PEERS, create_task
from .meter import Meter
from .momentum import MomentumTask
from .portable import TASK_FILE, write_portable
from .saver import RunSaver, find_resume, newest_files, read_checkpoint, resume_path
