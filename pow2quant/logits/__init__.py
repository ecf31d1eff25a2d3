"""What a network says of each image: float, quantized and corrected, side by side."""
