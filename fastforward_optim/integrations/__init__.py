"""Callbacks for the trainers of transformers and Lightning; each needs an extra.

Each callback constructs a ``FastForward``, measures the trainer's own loss and reports stages.
``shared.py`` and ``attributes.py`` hold the code that both need. No lower layer imports this one.
"""
