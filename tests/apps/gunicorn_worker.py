"""What gunicorn is given by name: a worker class with the loop of the case that runs it."""

from __future__ import annotations

from typing import ClassVar

from uvicorn_worker import UvicornWorker


class Worker(UvicornWorker):
    CONFIG_KWARGS: ClassVar = {**UvicornWorker.CONFIG_KWARGS, "loop": "tests.apps:new_event_loop"}
