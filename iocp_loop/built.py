"""The compiled parts of the package: why one is missing, said alike by the doctor, by errors and at import."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import os
import sys
from pathlib import Path

__all__ = ["complain_of_what_is_missing", "needed_modules", "why_missing"]


def needed_modules() -> list[str]:
    """The compiled modules that a complete installation has on this platform, best known first."""
    binding = {"linux": ["_uring"], "win32": ["_iocp"]}.get(sys.platform, [])
    return [f"{__package__}.{name}" for name in ["_hot", *binding]]


def why_missing(module: str, error: ImportError) -> str:
    """Why the compiled `module` is not available, with the way out; `error` is what its import raised."""
    if not isinstance(error, ModuleNotFoundError) or error.name != module:
        return f"{module} cannot be imported: {error}"
    stem = module.rpartition(".")[2]
    ours = {stem + suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    found = (path.name for path in Path(__file__).parent.glob(f"{stem}.*") if path.suffix in (".so", ".pyd"))
    others = sorted(name for name in found if name not in ours)
    if others:
        return f"{module} was not built for this Python, only {', '.join(others)}; reinstall with this Python's pip"
    return (
        f"{module} was not built: no C compiler or no Python headers when iocp_loop was installed; "
        "reinstall with both at hand, or from a wheel for this platform"
    )


def complain_of_what_is_missing() -> None:
    """Log one line if this installation lacks compiled parts.

    For debug mode only: whoever installed without a compiler was told nothing but "Successfully installed".
    """
    missing = [name for name in needed_modules() if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("IOCP_LOOP_NATIVE") != "0":
        logging.getLogger("iocp_loop").warning(
            "iocp_loop runs without %s, which was not built: it is slower%s; `python -m iocp_loop` tells more",
            " and ".join(missing),
            ", and has driver poll alone" if len(missing) > 1 else "",
        )
