"""The methods that are compared, and how each of them takes its steps.

May import the layers below: ``comparison``, ``data``, ``models`` and ``support``.
"""
