"""`compress::w4_bsr_matmul`: a linear layer with a packed 4-bit weight of which whole blocks are zero."""
