"""`compress::w4_sparse24_matmul`: a linear layer with a packed 4-bit weight, two of every four zero."""
