"""Masked fine-tuning: the loop, the weights that it may change, how the model runs meanwhile."""
