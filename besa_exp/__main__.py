"""`python -m besa_exp` is `besa`; of several processes that torchrun starts, the first alone speaks."""

import os
import sys
from pathlib import Path

from besa_exp.main import main

if os.environ.get("TORCHELASTIC_RUN_ID") and os.environ.get("RANK", "0") != "0":
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
sys.exit(main())
