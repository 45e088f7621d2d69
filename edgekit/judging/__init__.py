"""Judgments: parity, verdicts, and the parity ladder that says where a file goes wrong."""
