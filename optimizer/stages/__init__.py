"""The stations of a job, in the order of the path: profile, score, search, verify, measure, publish."""
