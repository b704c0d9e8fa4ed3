"""What pyproject.toml cannot say: the native part is built by cffi, and it is optional.

Without cffi at build time, without a compiler or without the headers that it needs, the build goes on and
leaves the native part out; the package then runs on driver ``poll``, and ``python -m iocp_loop`` says so.
"""

import runpy
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
            warnings.warn(f"{ext.name} is left out, only driver poll will work: {error}", stacklevel=1)


def native_modules() -> list[str]:
    """What to hand to cffi: one ``path:name`` entry, or none where this platform has no native part."""
    try:
        import cffi  # noqa: F401 - needed by the build script
    except ImportError as error:
        warnings.warn(f"the native part is left out, only driver poll will work: {error}", stacklevel=1)
        return []
    if runpy.run_path(BUILD_SCRIPT)["ffibuilder"] is None:
        return []
    return [f"{BUILD_SCRIPT}:ffibuilder"]


setup(cmdclass={"build_ext": OptionalBuildExt}, cffi_modules=native_modules())
