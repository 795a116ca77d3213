"""Model families that several systems use."""
