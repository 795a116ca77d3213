"""One module a published system, at three sizes, with its claims as data. Only the command line imports them."""
