"""The models to train, their adapters, and models with random weights for timing.

May import ``support``.
"""
