"""Frameworks: the callbacks for transformers and Lightning, each an extra.

One trainer each; ``shared.py`` and ``attributes.py`` hold what both need. They construct a
``FastForward``, measure the trainer's own loss and report stages; nothing below knows them.
"""
