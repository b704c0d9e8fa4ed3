"""Driver uring: io_uring."""
