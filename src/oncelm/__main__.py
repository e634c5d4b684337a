"""`python -m oncelm`, and so `torchrun ... -m oncelm`: the `oncelm` command."""

import sys

from oncelm.cli import main

sys.exit(main())
