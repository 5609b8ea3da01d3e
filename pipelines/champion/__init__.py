"""From a registered candidate to the version that answers, and back."""
