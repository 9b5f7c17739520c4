"""``python -m userllm``."""

from userllm.cli import main

main()
