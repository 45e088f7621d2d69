"""Metrics of accuracy, and how sure a difference of two is."""
