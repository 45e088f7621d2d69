"""Samples for calibration and evaluation: arrays, image folders and the user's own iterables."""
