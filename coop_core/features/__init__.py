"""Images -> what the frozen image tower says of them, computed once."""
