"""`python -m onstep`: see `onstep.cli`."""

import sys

from .cli import main

sys.exit(main())
