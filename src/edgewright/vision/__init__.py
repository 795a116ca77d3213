"""Vision model families and what only they need."""
