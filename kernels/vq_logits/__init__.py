"""`compress::vq_logits`: an output head of a few codebooks, and the exact logits of its candidates."""
