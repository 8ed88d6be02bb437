"""What executes a model: torch, ONNX Runtime or TensorRT, behind one protocol."""
