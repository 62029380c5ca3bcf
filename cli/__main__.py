"""`python -m vlsi_cache_cli`, which is also how launchers start it: `torchrun -m vlsi_cache_cli distill ...`."""

import sys

from .main import main

sys.exit(main())
