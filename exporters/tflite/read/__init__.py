"""Reading ONNX models into the graph that is lowered."""
