"""Tells ThreadSanitizer of the locks of module threading, which it does not see: see tsan.h.  Imported at start."""

import _thread
import ctypes
import queue
import threading

_tsan = ctypes.PyDLL(None)
_acquired, _released = _tsan.__tsan_acquire, _tsan.__tsan_release
_acquired.argtypes = _released.argtypes = (ctypes.c_void_p,)


class Lock:
    def __init__(self):
        self._lock = _thread.allocate_lock()
        self._at_fork_reinit = self._lock._at_fork_reinit
        self.locked = self._lock.locked

    def acquire(self, blocking=True, timeout=-1):
        if acquired := self._lock.acquire(blocking, timeout):
            _acquired(id(self._lock))
        return acquired

    def release(self):
        _released(id(self._lock))
        self._lock.release()

    __enter__ = acquire

    def __exit__(self, *_):
        self.release()


threading.Lock = threading._allocate_lock = Lock
threading._CRLock = None  # there is one in Python, made of the above
queue.SimpleQueue = queue._PySimpleQueue
