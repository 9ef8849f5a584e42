"""Reports: scores of the base, of the erased model and of controls, as JSON, page and card."""

from erase.eval.report.report import EvalReport, Score

__all__ = ["EvalReport", "Score"]
