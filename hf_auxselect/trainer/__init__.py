"""The only package that uses private names of ``Trainer``, its accelerator and its loaders."""
