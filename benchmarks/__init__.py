"""Cost of CGH relative to a lower bound or to other software; see `benchmark.py`."""
from .data import benchmark_data, benchmark_e2e
from .growth import benchmark_loss, benchmark_processes
from .knn import benchmark_knn
from .step import benchmark_step, benchmark_variants
