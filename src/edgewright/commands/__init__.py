"""The commands, one module each: `add_arguments(parser)` and `run(args)`. `edgewright.cli` has their table."""
