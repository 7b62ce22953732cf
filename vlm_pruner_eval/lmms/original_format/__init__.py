"""Checkpoints in the format that LLaVA's authors publish, which transformers does not read."""
