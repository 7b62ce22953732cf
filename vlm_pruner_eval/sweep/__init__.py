"""Sweeps: a validated YAML file becomes a grid of runs, each with its own directory of records."""
