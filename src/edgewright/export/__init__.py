"""Files for real runtimes: written, read back, run and compared with the model before they are called done."""

from edgewright.export.gguf.exporter import GGUFExport, export_gguf, llama_cpp_quantize
from edgewright.export.huggingface import save_dequantized, save_quantized

__all__ = ["GGUFExport", "export_gguf", "llama_cpp_quantize", "save_dequantized", "save_quantized"]
