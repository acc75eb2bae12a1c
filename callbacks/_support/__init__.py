"""Private details of pages, text and event files that built-in callbacks share."""
