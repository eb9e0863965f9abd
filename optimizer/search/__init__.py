"""The search of one job: the loop, its budget, its rungs, its constraints, the choice of finalists."""
