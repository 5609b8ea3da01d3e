"""Everything that was found -> one page and its pictures."""
