"""Job specification: reading, checking, describing and looking up one job."""
