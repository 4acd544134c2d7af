"""``python -m lightning_memload``, see :mod:`lightning_memload.cli`."""

import sys

from lightning_memload.cli import main

if __name__ == "__main__":
    sys.exit(main())
