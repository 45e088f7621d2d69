"""Pruning of channels and of weights, and the recovery from it."""
