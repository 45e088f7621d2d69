"""Exporters: one module per file format."""
