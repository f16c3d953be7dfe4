"""corral: one inventory, a whole local GPU inference farm."""

__version__ = "0.1.0"
