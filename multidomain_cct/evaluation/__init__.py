"""Prediction of whole images, and its scores."""
