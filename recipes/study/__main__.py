"""``python recipes/study --size smoke``."""

import sys

from run import main

sys.exit(main())
