"""Loads a multimodal checkpoint in transformers as its users do, shows it a picture, and reports its logits.

``answer`` is called in a fresh process. It uses none of quantmill's engine: the library that users have is tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from workers.machine.memory import peak_host_bytes
from workers.model.card_room import has_card
from workers.spec.base import Frozen
from workers.spec.families import forward_of
from workers.verify.runtimes.reply import reply
from workers.verify.runtimes.transformers import KEY_LISTS, be_quiet

# Pixels of a side: the least that all of the usual processors take as it is, or make larger.
SIDE = 224
PROMPT = "The picture shows a bright disc above a striped field. From left to right, the colours of the stripes are"


class PictureRequest(Frozen):
    """Request for the logits at the last ``positions`` of a prompt with a picture.

    They are written to ``logits.safetensors`` in the folder ``scratch``, float32 [at most positions, V].
    """

    folder: str
    scratch: str
    loader: str
    dtype: str = Field(description="Of torch, by its name; auto: the checkpoint's.")
    positions: int = Field(ge=1)
    trust_remote_code: bool = False


def answer(request: str) -> str:
    """The result of a ``PictureRequest``, as JSON: ``version``, ``pixels`` (whether any came to the model)."""
    be_quiet()
    return reply(request, _look)


def draw() -> Any:
    """The picture, a PIL image: a bright disc on a gradient sky above stripes of several colours."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    horizon = SIDE // 2
    for row in range(horizon):
        pen.line([(0, row), (SIDE, row)], fill=(40 + row, 90 + row // 2, 200 - row // 2))
    colours = [(200, 60, 50), (230, 200, 60), (60, 150, 80), (120, 70, 160), (240, 240, 235), (30, 40, 60)]
    width = SIDE // len(colours) + 1
    for number, colour in enumerate(colours):
        pen.rectangle([number * width, horizon, (number + 1) * width, SIDE], fill=colour)
    pen.ellipse([140, 20, 190, 70], fill=(255, 240, 170))
    return image


def _look(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers
    from safetensors.torch import save_file

    folder, trusted = Path(request["folder"]), request["trust_remote_code"]
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=trusted)
    inputs = _inputs(processor)
    device = "cuda" if has_card() else "cpu"
    dtype = request["dtype"]
    model, loading = getattr(transformers, request["loader"]).from_pretrained(
        folder,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        device_map=device,
        output_loading_info=True,
        trust_remote_code=trusted,
        generation_config=transformers.GenerationConfig(),
    )
    given = {
        name: value.to(device, model.dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
    }
    with torch.inference_mode():
        logits = forward_of(model)(**given, use_cache=False).logits[0, -request["positions"] :].float().cpu()
    save_file({"logits": logits.contiguous()}, Path(request["scratch"]) / "logits.safetensors")
    return {
        "version": transformers.__version__,
        "pixels": any("pixel" in name or "image" in name or "patch" in name for name in given),
        "missing": sorted(str(key) for kind in KEY_LISTS for key in loading.get(kind) or () if "missing" in kind),
        "host_bytes": peak_host_bytes(),
    }


def _inputs(processor: Any) -> Any:
    """The prompt with the picture, as the processor prepares it: by its chat template, if that has a place for one."""
    token = getattr(processor, "image_token", None) or "<image>"
    text = f"{token}{PROMPT}"
    if getattr(processor, "chat_template", None):
        said = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        templated = processor.apply_chat_template([{"role": "user", "content": said}], tokenize=False)
        if token in templated:
            text = templated
    return processor(images=draw(), text=text, return_tensors="pt")
