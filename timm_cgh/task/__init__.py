from .cgh import CGHTask, create_task
