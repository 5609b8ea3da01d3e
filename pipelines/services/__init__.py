"""Servers and workers on this machine."""
