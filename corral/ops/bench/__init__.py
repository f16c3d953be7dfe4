"""Measured capacity: load from Locust, figures, sweeps, reports, and limits proposed for the inventory.

Requests are sent by Locust in a process of its own (load-tests/); nothing here imports it.
"""
