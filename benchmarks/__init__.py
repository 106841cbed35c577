"""Benchmarks. Run one with `python -m benchmarks.NAME` from the repository root."""
