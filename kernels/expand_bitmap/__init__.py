"""`compress::expand_bitmap`: a bitmap and the entries that are not zero to a float weight."""
