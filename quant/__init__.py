"""COMPRESS: recipes, the quantizer, graph passes."""
