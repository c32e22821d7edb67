"""How tokens become text while they come."""
