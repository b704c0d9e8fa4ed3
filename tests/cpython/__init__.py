"""CPython's own asyncio tests on IocpEventLoop; see suite.py."""
