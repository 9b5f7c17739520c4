"""How good the answers are, and how sure we may be of it."""
