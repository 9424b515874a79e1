"""Running bundles: ONNX Runtime, PyTorch, and engines."""
