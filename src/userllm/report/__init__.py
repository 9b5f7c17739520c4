"""A run folder -> one page that says what was run, what came out, and how sure we may be of it."""

from userllm.report.html import write_report

__all__ = ["write_report"]
