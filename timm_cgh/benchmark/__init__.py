"""What CGH costs beside what it could cost; see `benchmark.py`."""
from .data import benchmark_data, benchmark_e2e
from .growth import benchmark_loss, benchmark_processes
from .knn import benchmark_knn
from .step import benchmark_step, benchmark_variants
