# PYTHON_ARGCOMPLETE_OK
"""The command line as ``python -m hf_auxselect.cli``, for ``torchrun -m`` and the like."""

import sys

from hf_auxselect.cli import main

if __name__ == "__main__":
    sys.exit(main())
