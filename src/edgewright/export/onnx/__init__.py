"""Models as ONNX files: tracing, packed layers, writing, running, comparing."""
