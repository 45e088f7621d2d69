"""Models: every form of source becomes a Model with named inputs, outputs and state."""
