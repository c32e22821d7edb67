"""Whether a model is what it was: its modules, its code and the numbers in its weights."""
