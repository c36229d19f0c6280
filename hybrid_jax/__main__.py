"""`python -m hybrid_jax`."""

import sys

from hybrid_jax.commands.main import main

sys.exit(main())
