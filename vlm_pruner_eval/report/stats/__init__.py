"""Statistics of the rows: against one another, and by parts of the documents."""
