"""What Python imports at its start in the processes of ``iocp-loop run``: launch.py puts this folder on PYTHONPATH.

It takes over asyncio's loops, then gets out of the way: the folder leaves sys.path, the environment becomes what it
was (with ``--children`` it stays, for them), and the sitecustomize that would have been imported is imported.
"""

import importlib.machinery
import importlib.util
import os
import sys

VARIABLE = "IOCP_LOOP_RUN"
HERE = os.path.dirname(os.path.abspath(__file__))


def restore_environment() -> None:
    rest = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder != HERE]
    os.environ.pop(VARIABLE, None)
    os.environ.pop("PYTHONPATH", None)
    if any(rest):
        os.environ["PYTHONPATH"] = os.pathsep.join(rest)


def import_the_next_one() -> None:
    spec = importlib.machinery.PathFinder.find_spec(__name__)
    if spec is not None and spec.loader is not None:
        module = sys.modules[__name__] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def take_over(wanted: list[str]) -> None:
    if "children" in wanted:
        os.environ[VARIABLE] = ",".join(word for word in wanted if word != "first")
    else:
        restore_environment()
    if importlib.util.find_spec("iocp_loop") is None:
        # A child may be another Python, which is none of our business.
        if "first" in wanted:
            print(f"iocp_loop is not installed for {sys.executable}", file=sys.stderr, flush=True)
            os._exit(2)
        return
    from iocp_loop import takeover

    if "stats" in wanted:
        takeover.take_over(kind=takeover.report_statistics_at_exit())
    else:
        takeover.take_over()


sys.path[:] = [folder for folder in sys.path if folder != HERE]
if VARIABLE in os.environ:
    take_over(os.environ[VARIABLE].split(","))
import_the_next_one()
