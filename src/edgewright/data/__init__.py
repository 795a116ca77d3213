"""Small real data sets and generators that several systems use."""
