"""Language: tasks and model families of text, and what only they need."""
