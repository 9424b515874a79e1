"""Export of the variants of a program as ONNX graphs."""
