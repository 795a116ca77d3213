"""Models as ExecuTorch files (.pte): lowering to XNNPACK, writing, running, comparing."""
