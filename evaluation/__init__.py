"""How results come about and are compared: persons held out, measures, pictures."""
