"""Plots of runs and evaluations; without matplotlib, functions that draw write nothing and return False."""
from .comparison import Run, save_chart, save_tables, summarise
from .curves import save_curves, save_runs
from .evaluation import save_class_accuracy, save_confusion, save_retrieval_grid
from .relations import RelationCurve, TrackedRun, read_tracked_run, relation_curve, save_relations
