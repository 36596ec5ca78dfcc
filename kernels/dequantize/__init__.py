"""`compress::dequantize`: packed integer codes to a float weight."""
