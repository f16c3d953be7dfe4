"""The public side of the gateway: its frontends, routes, refusals and keys."""
