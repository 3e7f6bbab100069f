"""Let ``python -m ckptool`` be the console script."""

from __future__ import annotations

import sys

from ckptool.cli import main

sys.exit(main())
