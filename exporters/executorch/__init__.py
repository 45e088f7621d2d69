"""ExecuTorch: .pte programs with the XNNPACK delegate."""
