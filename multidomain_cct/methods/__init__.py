"""How unlabelled images are used, one file for each method.

All share the encoder, the heads, the data and the loop; only the losses differ.
"""
