"""Measurements of the library itself: time, memory, drift, and what line searches find.

May import ``comparison`` and the layers below it.
"""
