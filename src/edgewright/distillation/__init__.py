"""Learning from a teacher: losses on logits, data the teacher writes itself, its answers cached on disk."""
