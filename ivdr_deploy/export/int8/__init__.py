"""The int8 engine for the CPU: an fp32 ONNX graph of a CNN, lowered to 8-bit channels-last operators."""
