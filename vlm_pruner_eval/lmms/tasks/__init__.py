"""lmms-eval tasks as the VLM-Pruner paper ran them, where the stock ones differ, and the functions they name."""
