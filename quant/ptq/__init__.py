"""Post-training quantization: recipes, quantizer, observers, and what makes int8 accurate."""
