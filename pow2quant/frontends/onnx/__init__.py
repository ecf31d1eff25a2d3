"""Float ONNX files as networks: read into PyTorch's modules, then prepared like any other network."""
