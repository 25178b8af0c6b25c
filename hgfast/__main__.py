"""`python -m hgfast`."""

import sys

from hgfast.cli import main

sys.exit(main())
