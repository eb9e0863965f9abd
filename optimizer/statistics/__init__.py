"""Statistics behind every published number: intervals, tests, and the agreement of ranks."""
