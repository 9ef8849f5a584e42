"""Measurements of time and memory; not installed."""
