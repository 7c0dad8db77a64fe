"""Builds the C library with cargo and puts it into the package. BATCHNORM_PROFILE names another profile than release."""

import json
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

HERE = Path(__file__).resolve().parent


def build_library() -> Path:
    """The shared library, built."""
    profile = os.environ.get("BATCHNORM_PROFILE", "release")
    manifest = HERE.parent / "c" / "Cargo.toml"
    command = ["cargo", "build", "--profile", profile, "--manifest-path", str(manifest), "--lib"]
    try:
        lines = subprocess.check_output(command + ["--message-format=json-render-diagnostics"], text=True).splitlines()
    except FileNotFoundError:
        raise SystemExit("cargo was not found: install Rust from https://rustup.rs") from None
    made = [file for line in lines for file in json.loads(line).get("filenames", []) if "batchnorm_c" in file]
    return next(Path(file) for file in made if Path(file).suffix in (".so", ".dylib", ".dll"))


class Build(build_py):
    def run(self) -> None:
        super().run()
        library = build_library()
        folder = HERE / "src" / "batchnorm" if self.editable_mode else Path(self.build_lib) / "batchnorm"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, folder / f"libbatchnorm_c{library.suffix}")


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # The library knows nothing of Python: any version of it will do.
        return "py3", "none", super().get_tag()[2]


class Native(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel}, distclass=Native)
