"""Exported models in the real engines, each in a virtual environment of its own.

`make test-export` makes the environments in build/engines; `table.py` prints what holds.
"""
