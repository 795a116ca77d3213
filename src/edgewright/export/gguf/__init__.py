"""Models as GGUF files: types and layout of tensors, metadata, writing, reading back, running, comparing."""
