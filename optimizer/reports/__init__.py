"""A job's report: read from the database, told in words, drawn as one self-contained HTML file or as a picture."""
