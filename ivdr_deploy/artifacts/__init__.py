"""One home for every file format: checkpoint, bundle, manifest, golden clips and videos, ONNX metadata, sidecar."""
