"""`python -m zeoid` is the command `zeoid`."""

import sys

from zeoid.cli import main

sys.exit(main())
