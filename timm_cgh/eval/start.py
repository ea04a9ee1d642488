"""The start of an evaluation script."""
from typing import Optional

import torch
from timm.utils import setup_default_logging

from timm_cgh.distributed import Process, init_process
from timm_cgh.files import check_file, make_folder

__all__ = ['start_evaluation']


def start_evaluation(
        device: str = 'cpu',
        seed: int = 42,
        output: Optional[str] = None,
        results_file: Optional[str] = None,
) -> Process:
    """Set up logging and the process, and make the folders that results go to, before hours are spent on them.

    Args:
        device, seed: see `init_process`
        output: folder for plots and other files
        results_file: JSON or CSV file

    Raises:
        InputError: no such device, a place that cannot be written to
    """
    setup_default_logging()
    # The softmax of a head at a high rate is full of numbers below 1e-38, which slow a CPU down. Threads inherit the
    # setting when they start: set it first.
    torch.set_flush_denormal(True)
    process = init_process(device, seed)
    if output:
        make_folder(output, 'output', output)
    if results_file:
        check_file(results_file, 'results_file', ('.json', '.csv'))
    return process
