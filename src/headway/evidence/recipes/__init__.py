"""One module per paper, named by its slug with underscores; each defines `RECIPE`. A leading `_` marks a helper."""
