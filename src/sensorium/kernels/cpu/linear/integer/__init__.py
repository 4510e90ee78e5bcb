"""Products of rows quantized to 8 bits: quantization, launches, the crosswise form."""
