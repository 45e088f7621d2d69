"""Measurements of files on devices: runs, latencies, and what is kept of them."""
