"""Other forms of a bundle: one ONNX model, or a Triton repository."""
