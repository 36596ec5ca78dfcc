"""`compress::w4a8_matmul`: a linear layer with a packed 4-bit weight and activations rounded to 8 bits."""
