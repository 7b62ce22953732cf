"""The record's house: what a results directory holds, and the only code that reads and writes it. Needs no torch."""
