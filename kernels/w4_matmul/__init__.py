"""`compress::w4_matmul`: a linear layer with a packed 4-bit weight."""
