"""A job's report: read from the database, put into sentences, drawn as one self-contained HTML file or as a picture."""
