"""Dual encoders of images and texts: building them, training them, and reading cases for them."""
