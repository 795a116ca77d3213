"""CPU kernels that no library has: C++ compiled on first use, beside each a plain-torch twin as oracle and fallback."""
