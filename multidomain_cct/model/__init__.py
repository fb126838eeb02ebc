"""Floor 2: encoder, decoders, losses."""
