"""What gunicorn is given by name: a worker class with the loop of the case that runs it."""

from __future__ import annotations

from typing import Any

from . import load

Base: Any = load("uvicorn_worker").UvicornWorker
Worker = type("Worker", (Base,), {"CONFIG_KWARGS": {**Base.CONFIG_KWARGS, "loop": "tests.apps:new_event_loop"}})
