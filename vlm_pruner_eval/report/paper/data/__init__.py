"""Printed numbers and their errata; results/paper/README.md explains the columns."""
