"""Measurements, each a command of its own; `python -m benchmarks` (or `make bench`) runs them all."""
