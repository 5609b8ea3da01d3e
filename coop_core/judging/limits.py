"""Limits of the watch: how far what a version is sent may be from its test images; params.yaml sets them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    significance: float
    """At most so often any sign is raised where nothing differs."""
    max_auc: float
    """How well a classifier may tell what is sent from the test images: 0.5 not at all, 1 always."""
    max_confidence_shift: float
    """How far the distributions of confidences may lie apart, in shares of images (Kolmogorov-Smirnov)."""
    max_label_shift: float
    """Which share of the images may be answered with other labels than the test's mix (total variation)."""
    max_abstention_rise: float
    """By how much the share of images without an answer may rise."""
    min_images: int
    """Below, nothing is judged."""
