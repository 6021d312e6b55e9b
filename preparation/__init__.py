"""From raw frames to difference images: what prepare_CASME3.py is made of."""
