"""Difference images: what a pixel means, lists, decoding, transforms."""
