"""The tests on every Python that this machine has: ``make test-all``, or ``nox`` by itself.

A version that is not here is skipped and named in the summary.
"""

import os
from pathlib import Path

import nox

VERSIONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["tests"]

# pyenv puts a stub for each version on PATH, which refuses to run unless that version is switched on.  The real
# interpreters go before them.
_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
_found = [str(home / "bin") for version in VERSIONS for home in sorted(_pyenv.glob(f"{version}.*"), reverse=True)]
os.environ["PATH"] = os.pathsep.join([*_found, os.environ.get("PATH", os.defpath)])


@nox.session(python=VERSIONS)
def tests(session: nox.Session) -> None:
    """The whole suite; arguments after ``--`` go to pytest."""
    session.install("--editable", ".[test]")
    session.run("python", "-m", "iocp_loop")
    session.run("python", "-m", "pytest", *session.posargs)
