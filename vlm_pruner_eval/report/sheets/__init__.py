"""The tables of a report, laid out for readers in any format."""
