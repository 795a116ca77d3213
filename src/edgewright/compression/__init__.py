"""The main job: a language model shrunk to a chosen width, shipped as a file, verified."""
