"""ONNX files, as ONNX Runtime runs them fastest."""
