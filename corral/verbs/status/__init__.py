"""`status`, `logs`, `watch` and metrics of a host."""
