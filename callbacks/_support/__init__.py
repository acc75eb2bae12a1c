"""Details of the built-in callbacks that authors of callbacks do not need: pages, text tables, event files."""
