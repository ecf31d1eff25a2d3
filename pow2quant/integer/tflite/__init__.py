"""A program as a TFLite file: int8, channels last, written with the schema's own classes and no TensorFlow."""
