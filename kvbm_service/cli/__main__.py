"""`python -m kvbm_service.cli` is `kvbm`."""

from __future__ import annotations

import sys

from kvbm_service.cli import main

if __name__ == "__main__":
    sys.exit(main())
