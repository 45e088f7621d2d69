"""Passes over the graph before it is lowered."""
