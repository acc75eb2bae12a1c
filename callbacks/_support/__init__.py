"""Details of the built-in callbacks: the report's page, lines in a terminal, event files."""
