"""Static int8 networks: observers, folding of batch norms, training, files, integer arithmetic."""
