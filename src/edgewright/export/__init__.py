"""Files for real runtimes: written, read back, run and compared with the model before they are called done."""
