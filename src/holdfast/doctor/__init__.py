"""Looks at an installation and says what to fix, before a worker spends minutes on failing. Must never change it."""
