"""Benchmarks over time, run by asv."""
