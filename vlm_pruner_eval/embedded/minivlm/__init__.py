"""The MiniVLM checkpoint: data only; README.md is its model card."""
