"""`vlm-pruner-eval doctor`: what of an installation and its surroundings would get into the way of a sweep, each with its mending."""
