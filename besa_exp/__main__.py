"""`python -m besa_exp` is `besa`."""

import sys

from besa_exp.main import main

sys.exit(main())
