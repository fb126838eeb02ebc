"""Semi-supervised semantic segmentation over many domains by cross-consistency training."""

__version__ = "0.3.0"
