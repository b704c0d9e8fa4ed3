"""Pipes: their transports on UNIX and on Windows, and named pipes."""
