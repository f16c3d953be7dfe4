"""Pure decisions: hosts, cards, replicas, memory and placement of one inventory."""
