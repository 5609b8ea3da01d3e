"""MLflow: runs, trials and the registry. Nothing else in the product talks to it."""
