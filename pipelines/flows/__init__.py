"""Prefect flows: sweeps, retraining, promotion and repair, each a thin wrapper."""
