"""`python -m evopatch`."""

from .cli import main

main()
