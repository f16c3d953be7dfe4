"""`workers`: keys of machines that dial in, and what they need on their side."""
