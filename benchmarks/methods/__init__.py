"""The methods that are compared, and how each takes its steps. ``registry.py`` lists them.

May import the layers below: ``comparison``, ``data``, ``models`` and ``support``.
"""
