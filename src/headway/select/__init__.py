"""The verb `select`: score a corpus with a model's attention and keep the best part of it."""
