"""What tests/test_detection_script.py runs under torchrun: eval_detection.py trains into FOLDER/run, each process
writes its parameters, and the detector is evaluated again with `--eval-only`, into FOLDER/two.

python -m torch.distributed.run --nproc_per_node 2 tests/detection_worker.py FOLDER ARGS...
"""
import os
import sys
from functools import cache

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import torch
import torch.distributed as dist

import eval_detection as script
from timm_cgh.eval import start

detectors = []
create_detector = script.create_detector


def keep_detector(*args):
    detectors.append(create_detector(*args))
    return detectors[0]


if __name__ == '__main__':
    torch.set_num_threads(1)
    folder, *args = sys.argv[1:]
    script.create_detector = keep_detector
    # one process group for both runs: torchrun's store would give a second one the addresses of the first
    start.init_process, script.end_process = cache(start.init_process), lambda process: None
    code = script.parser.run(script.main, [*args, '--output', f'{folder}/run'])
    dist.barrier()  # rank 0 writes the detector
    torch.save(dict(detectors[0].named_parameters()), f"{folder}/parameters-{os.environ['RANK']}.pt")
    again = ['--eval-only', f'{folder}/run/detector.safetensors', '--output', f'{folder}/two']
    code = code or script.parser.run(script.main, [*args, *again, '--results-file', f'{folder}/two.json'])
    dist.destroy_process_group()
    sys.exit(code)
