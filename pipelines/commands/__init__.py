"""What people type: `coop ...`."""
