"""Plans for other people's deployments: one format a file, behind a registry. Importing this imports nothing heavy."""
