#!/bin/bash
# Pre-train on several processes of one machine: ./distributed_train.sh NUM_PROCESSES [train.py's flags]
NUM_PROC=$1
shift
exec torchrun --nproc_per_node="$NUM_PROC" "$(dirname "$0")/train.py" "$@"
