"""`compress::low_rank_matmul`: two small linear layers in one launch."""
