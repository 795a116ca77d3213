"""Models and data in and out: Hugging Face folders, GGUF, safetensors, text; limits for files from outside."""
