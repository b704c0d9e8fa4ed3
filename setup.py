"""What pyproject.toml cannot say: the native parts are built from C, and they are optional.

There are two: the binding, which cffi makes, and the native tier (iocp_loop/native.py).  Without cffi at build time,
without a compiler or without the headers that they need, the build goes on and leaves them out; the package then runs
on driver ``poll``, all in Python, and ``python -m iocp_loop`` says so.
"""

import os
import runpy
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD_SCRIPT = "iocp_loop/_cffi_build.py"
NATIVE = Path("iocp_loop/_native")


class OptionalBuildExt(build_ext):
    """``build_ext`` that turns every failure to compile into a warning."""

    def finalize_options(self) -> None:
        super().finalize_options()
        for extension in self.extensions or ():
            # Without this a changed header would not make setuptools compile again.
            extension.depends = [str(path) for path in NATIVE.rglob("*") if path.is_file()]
            # An editable install copies the results beside the sources; `optional` lets it skip what is not there.
            extension.optional = True

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # whatever went wrong, the package works without
            lost = "the loop will be slower" if ext is HOT else "only driver poll will work"
            warnings.warn(f"{ext.name} is left out, {lost}: {error}", stacklevel=1)


#: Set for the wheel that has no native code: for systems that have no binding, or no compiler.
PURE = bool(os.environ.get("IOCP_LOOP_PURE"))

HOT = Extension(
    "iocp_loop._hot",
    sources=sorted(path.as_posix() for path in (NATIVE / "hot").glob("*.c")),
    libraries=["ws2_32"] if sys.platform == "win32" else [],
    # Its files call each other directly, as nobody outside does.
    extra_compile_args=[] if sys.platform == "win32" else ["-fvisibility=hidden"],
    optional=True,
)


def native_modules() -> list[str]:
    """What to hand to cffi: one ``path:name`` entry, or none where this platform has no native part."""
    if PURE:
        return []
    try:
        import cffi  # noqa: F401 - needed by the build script
    except ImportError as error:
        warnings.warn(f"the native part is left out, only driver poll will work: {error}", stacklevel=1)
        return []
    if runpy.run_path(BUILD_SCRIPT)["ffibuilder"] is None:
        return []
    return [f"{BUILD_SCRIPT}:ffibuilder"]


setup(cmdclass={"build_ext": OptionalBuildExt}, ext_modules=[] if PURE else [HOT], cffi_modules=native_modules())
