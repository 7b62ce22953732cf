"""Scores through each task's own aggregation, and the cluster bootstrap of them."""
