"""Diagnosis: what attention means, measured in a model that is left as it is."""
