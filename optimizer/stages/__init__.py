"""The stages of a job, in the order of its path: profile, redundancy, search, verify, measure, collateral, publish."""
