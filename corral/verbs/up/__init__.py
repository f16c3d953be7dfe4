"""`up`, `down`, `restart`, `upgrade`, `rollback`."""
