"""The formats of a report, a file each; all of them walk the same tables."""
