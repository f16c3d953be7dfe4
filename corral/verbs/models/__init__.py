"""`models`: files of weights, and what is loaded."""
