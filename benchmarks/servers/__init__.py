"""The programs under load.  Each runs in a process of its own, one per run."""
