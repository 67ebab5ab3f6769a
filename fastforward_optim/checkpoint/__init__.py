"""Checkpoints: our part of a state dict, and loading one in a single transaction.

This package handles state dicts and the numbers of a calibration. It does not depend on what a
stage does.
"""
