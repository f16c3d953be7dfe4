"""Backups and bundles: one container format, and the verbs that make, read and lay it out."""
