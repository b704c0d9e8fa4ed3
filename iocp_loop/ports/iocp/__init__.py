"""Driver iocp: an I/O completion port of Windows."""
