"""Benchmarks: `python bench/run.py --list`."""
