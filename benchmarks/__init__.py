"""Benchmarks of fastforward_optim on real models; ``python -m benchmarks --help``."""
