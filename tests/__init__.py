"""The tests of iocp_loop: one file per subject, each run on every driver that this machine has."""
