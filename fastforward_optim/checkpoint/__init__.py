"""Checkpoints: our part of a state dict, and loading one in a single transaction.

Knows state dicts, and the calibration whose numbers it keeps. Does not know what a stage does.
"""
