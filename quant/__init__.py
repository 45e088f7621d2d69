"""Compression: recipes, the quantizer, graph passes."""
