"""What must hold: before an inventory is resolved, after it, and in what is rendered."""
