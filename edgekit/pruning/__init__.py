"""Pruning: options, steps and search, and the files of a pruned network."""
