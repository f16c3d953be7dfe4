"""`import`: what others' files say as an inventory, with a finding for every value that they have."""
