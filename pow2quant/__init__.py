"""Power-of-two quantization of PyTorch networks: one network, many executors, zero differing bits."""

__version__ = "0.1.0"
