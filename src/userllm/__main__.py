"""``python -m userllm``."""

import sys

from userllm.cli import main

sys.exit(main())
