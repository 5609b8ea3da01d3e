"""Upkeep: what nobody needs any more -> away; what must not be lost -> an archive, and back from it."""
