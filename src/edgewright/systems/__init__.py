"""Published systems, one folder each, named by its slug with underscores; `catalogue.csv` lists them all."""
