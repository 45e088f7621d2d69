"""Exported files: what they are called, what they hold, and the bundle that they lie in."""
