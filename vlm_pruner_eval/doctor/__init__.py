"""`vlm-pruner-eval doctor`: findings about the installation, the machine and a sweep file, each with a remedy."""
