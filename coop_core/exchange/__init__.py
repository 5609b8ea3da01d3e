"""Exchange: artefacts for programs without this product, and checkpoints of others as artefacts."""
