"""`setup`: a fresh machine, step by step."""
