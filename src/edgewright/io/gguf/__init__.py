"""GGUF files as models: headers, tensor types, families of names, tokenizers."""
