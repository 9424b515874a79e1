"""Writing the variants of a program as ONNX graphs."""
