"""`init`: looks at machines, and proposes an inventory for what it saw."""
