"""From raw frames to difference images: what prepare.py is made of."""
