"""What people who run such farms need, as they wrote it: reduced inventories, and what the kit makes of each."""
