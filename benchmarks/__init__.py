"""What the loop costs, beside other loops and a server in C: ``python -m benchmarks`` (see README.md)."""
