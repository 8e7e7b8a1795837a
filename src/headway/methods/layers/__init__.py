"""Trainable layers: token mixers that stand where attention stands."""
