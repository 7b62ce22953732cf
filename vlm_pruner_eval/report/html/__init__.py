"""report.html: its page, and figures as parts of it."""
