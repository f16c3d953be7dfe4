"""`demo`: the whole request path on this machine."""
