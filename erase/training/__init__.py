"""Masked fine-tuning: the loop, the weights that it may change, how the model runs meanwhile."""

from erase.training.loop import fit, make_accelerator

__all__ = ["fit", "make_accelerator"]
