"""Where a data set comes from -> files on this machine."""
