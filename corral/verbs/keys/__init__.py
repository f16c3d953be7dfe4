"""`keys`: consumers' keys at the gateway."""
