"""The echo server, a program: ``python -m iocp_loop.echo``."""
