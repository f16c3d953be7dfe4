"""The plan as files, in memory and on disk, and the secrets beside them."""
