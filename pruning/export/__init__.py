"""Exporting a base model with a plan to the formats that other engines read.

One file per format; `exporting.py` is the way in. Weights stream from file to file and are never
loaded as a model. Knows checkpoints and plans; knows nothing of serving.
"""
