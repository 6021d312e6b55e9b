"""Predicting with one checkpoint: what each kind of model is shown, and how it is told."""
