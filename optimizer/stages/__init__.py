"""The stages of a job, in order: profile, dense, redundancy, search, verify, measure, collateral, guard, publish."""
