"""Compression: a model becomes a program of another precision, and a file."""
