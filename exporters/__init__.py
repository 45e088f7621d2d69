"""EXPORT: one module per file format."""
