"""Faults tried on runs: `python -m tests.faults` tries them in full, and writes their figures to REPORT.md."""
