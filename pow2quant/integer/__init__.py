"""The integers behind a quantized network: how large they get, and what that proves."""
