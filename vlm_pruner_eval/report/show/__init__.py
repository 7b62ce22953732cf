"""Pictures of what methods kept: the command `show`, and the gallery of report.html."""
