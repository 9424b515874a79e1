"""Runners of bundles: on ONNX Runtime, PyTorch, and engines."""
