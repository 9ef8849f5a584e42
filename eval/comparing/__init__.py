"""Several runs of one base beside each other: a table, what was traded for what, their images."""

from erase.eval.comparing.pareto import front
from erase.eval.comparing.runs import Run, load_runs
from erase.eval.comparing.saving import save_comparison
from erase.eval.comparing.table import Cell, Comparison, compare

__all__ = ["Cell", "Comparison", "Run", "compare", "front", "load_runs", "save_comparison"]
