"""Everything that has an effect: environment, services, DVC stages, MLflow and the command line."""
