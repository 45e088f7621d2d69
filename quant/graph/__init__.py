"""Graphs: capture, passes, constants."""
