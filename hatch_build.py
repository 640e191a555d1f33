"""The hooks of pyproject.toml. The build hook compiles the CPU kernel into a wheel, or into the source tree for an editable installation.

Where there is no compiler, or one that fails, the package is installed all the same, with a note for `varlen_attn` to show.
``VARLEN_ATTN_PLATFORM`` is the tag of a wheel for another platform, whose compiler is then ``CXX``, and which must succeed.
The metadata hook writes the README and the addresses of the project, where `repository` in pyproject.toml says where that is.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        text, repository = Path(self.root, "README.md").read_text(), self.config["repository"].rstrip("/")
        if repository:
            release = f"v{metadata['version']}"
            for link, kind in ((r"(!\[[^]]*\]\()", "raw"), (r"(?<!!)(\[[^]]*\]\()", "blob")):
                text = re.sub(rf"{link}(?!https?:|#)", rf"\1{repository}/{kind}/{release}/", text)
            places = {"Source": "", "Documentation": f"/blob/{release}/docs/index.md", "Changelog": f"/blob/{release}/CHANGELOG.md"}
            metadata["urls"] = {name: f"{repository}{place}" for name, place in places.items()}
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        package = Path(self.root, "varlen_attn", "kernels", "cpu")
        compile = SimpleNamespace(**runpy.run_path(str(package / "compile.py")))
        ordered = os.environ.get("VARLEN_ATTN_PLATFORM", "")
        machine = next((known for known in ("x86_64", "aarch64", "arm64") if ordered.endswith(known)), "")
        target = package / compile.name(machine)
        system = "darwin" if ordered.startswith("macosx") else "linux" if ordered else sys.platform
        if ordered or not target.exists():
            self._scratch = tempfile.TemporaryDirectory()
            folder = package if version == "editable" else Path(self._scratch.name)
            target = folder / target.name
            try:
                compile.compile_into(folder, machine, system)
            except (compile.CannotCompile, OSError) as error:
                if ordered:
                    raise
                self.app.display_warning(f"the CPU kernel of varlen_attn is not compiled: {error}")
                target = target.with_suffix(".failed")
        if version != "editable" and target.exists():
            build_data["force_include"][str(target)] = f"varlen_attn/kernels/cpu/{target.name}"
        if target.suffix == ".so":
            platform = ordered or sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data.update(pure_python=False, tag=f"py3-none-{platform}")
