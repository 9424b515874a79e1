"""Other forms of a bundle: one ONNX model, a Triton repository."""
