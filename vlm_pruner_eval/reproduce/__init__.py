"""Reproduction of printed numbers: the noise floor first, then a gate on the unpruned row, then release and sane rows."""
