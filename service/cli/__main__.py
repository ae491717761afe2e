"""`python -m service.cli`, the same as `vitrail`."""

from service.cli import main

main()
