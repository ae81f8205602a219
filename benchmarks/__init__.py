"""Benchmarks, and what the kernels compile to; run from the repository root."""
