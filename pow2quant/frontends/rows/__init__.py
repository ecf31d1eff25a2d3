"""How each module is written as ONNX: one file for each family of modules, with its rows of the table."""
