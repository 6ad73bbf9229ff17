"""`python -m kdcore` is the `kd` command."""

import sys

from kdcore.cli import main

sys.exit(main())
