"""CPU kernels that no library has: C++ compiled on first use, each with a plain-torch reference and fallback."""
