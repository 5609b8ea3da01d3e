"""A parameter space -> trials, and trials -> scores."""
