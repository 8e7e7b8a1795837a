"""The verb `diagnose`: named questions that go deeper than `look`."""
