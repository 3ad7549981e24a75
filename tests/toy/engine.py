"""The toy engine: a library that makes a whole toy checkpoint by itself, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from workers.spec.engines import Engine

ROW = Engine("toylib", script="tests.toy.engine")


def main() -> None:
    """Read the request, print progress, write the checkpoint."""
    import torch
    from safetensors.torch import load_file, save_file

    request = json.loads(sys.stdin.readline())
    source, out = Path(request["source"]), Path(request["out"])
    if request["recipe"]["scheme"]["bits"] != 8:
        print(json.dumps({"error": f"{request['recipe']['scheme']['bits']} bits aren't 8; set scheme.bits: 8"}))
        return
    print("a library that talks while it works")
    stored, modules = {}, {}
    tensors = load_file(source / "model.safetensors")
    for number, (name, tensor) in enumerate(tensors.items()):
        module = name.removesuffix(".weight")
        if ".layers." in name and tensor.ndim == 2:
            scale = (tensor.float().abs().amax(1, keepdim=True) / 127).to(tensor.dtype)
            codes = (tensor.float() / scale.float()).round().clamp(-128, 127)
            stored |= {f"{module}.toy_codes": codes.to(torch.int8), f"{module}.toy_scale": scale}
            modules[module] = 0
        else:
            stored[name] = tensor
        print(number, "of", len(tensors))
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "toy"}}))
    scheme = request["recipe"]["scheme"]
    fallbacks = ["rounded by a toy"]
    print(json.dumps({"layout": {"schemes": [scheme], "modules": modules}, "fallbacks": fallbacks}))


if __name__ == "__main__":
    main()
