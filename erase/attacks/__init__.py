"""Attacks on an erasure: what brings a concept back. Shared by the evaluation and by adversarial
training."""
