"""The report's template, style and script, put into every file that is written."""
