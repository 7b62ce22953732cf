"""Every table of a report: its form, its columns, and the order of all of them."""
