"""The page of report.html as a Jinja template, and its style sheet."""
