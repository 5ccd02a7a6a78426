"""``python -m memlong``: the command line, also for launchers that start a module in several processes."""

from __future__ import annotations

from memlong.cli import main

if __name__ == "__main__":
    main()
