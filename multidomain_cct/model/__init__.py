"""Encoder, decoders, perturbations, losses."""
