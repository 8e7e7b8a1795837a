"""What the verbs share: one shell for pages, plain data for results, one manner in the terminal."""
