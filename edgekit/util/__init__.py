"""Tools without a word of models in them: atomic writes, forks, progress, the user's own code."""
