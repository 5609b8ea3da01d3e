"""Class names and context vectors -> text features, computing only the rows that matter."""
