"""From a checkpoint to a bundle: ONNX, TensorRT, and the proof that they compute the same."""
