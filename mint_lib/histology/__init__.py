"""Histology: what nuclei, their statistics and tiles of tissue are."""
