"""What stands between a handle and a protocol or a program: listeners, datagram transports, TLS, sending files."""
