"""Everything that knows the insides of ``Trainer``, and nothing else does."""
