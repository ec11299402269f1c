"""``python -m layershare`` is the ``layershare`` command."""

import sys

from layershare.cli import main

sys.exit(main())
