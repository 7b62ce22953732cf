"""The printed numbers and their errata, as in results/paper."""
