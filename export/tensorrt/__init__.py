"""Building engines with TensorRT and TensorRT-RTX."""
