"""What-if simulation of planned changes."""
