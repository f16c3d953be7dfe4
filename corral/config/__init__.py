"""From an inventory's text to a valid inventory, every problem with its place."""
