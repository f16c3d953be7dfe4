"""`doctor`: which hop of the farm fails, and what helps.

One module per area; each check is a small function with an id. `docs/doctor.md` lists them all.
"""
