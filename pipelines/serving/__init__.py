"""Serving: the champion of the registry -> answers over HTTP, on MLflow's own scoring server."""
