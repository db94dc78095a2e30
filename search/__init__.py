"""A user's own images: fitted, encoded, indexed and found. The commands are `python -m search VERB`."""
