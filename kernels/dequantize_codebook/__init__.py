"""`compress::dequantize_codebook`: packed codes and a table to a float weight."""
