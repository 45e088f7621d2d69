"""The jobs: export, compare, profile, verify, prune, and the checks before them."""
