"""Measured speed: `vlm-pruner-eval bench ...`. A table for people, and one JSON object as the last line on stdout."""
