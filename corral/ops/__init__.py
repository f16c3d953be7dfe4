"""Verbs that touch the running world: processes, ports, models on disk, requests to the gateway."""
