"""Adapters are trained on artifacts of bitsandbytes: with gradient checkpointing, steps lower the loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from pipeline.zoo import shipped
from tests.workers import jobs
from workers.quantize.one_pass import quantize
from workers.verify.card_body import training

LLAMA = jobs.ZOO / "models" / "llama-tiny"
RECIPES = ("bnb-nf4", "bnb-int8")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made, _ = quantize(jobs.job(LLAMA, tmp_path_factory.mktemp("runs"), *RECIPES), LLAMA)
    return {artifact.recipe: Path(artifact.path) for artifact in made}


class Lora(nn.Module):
    """A quantized layer with an adapter of rank 4 beside it (arXiv 2106.09685)."""

    def __init__(self, base: nn.Module, outputs: int, inputs: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out + (x.float() @ self.down.T @ self.up.T).to(out.dtype)


def adapted(model: transformers.PreTrainedModel) -> list[nn.Parameter]:
    """Freeze a model, put adapters beside the projections of its attention, and return their parameters."""
    model.requires_grad_(False)
    width = model.config.hidden_size
    for layer in model.model.layers:
        for name in ("q_proj", "o_proj"):
            setattr(layer.self_attn, name, Lora(getattr(layer.self_attn, name), width, width))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def losses(model: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
    tokens = torch.randint(3, 2000, (2, 32), generator=torch.Generator().manual_seed(5))
    optimizer, found = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(4):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_steps_on_an_adapter_lower_the_loss(name: str, artifacts: dict[str, Path]) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(artifacts[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "norm" in key or "up_proj" in key}
    parameters = adapted(model)
    model.train()
    model.activation_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    found = losses(model, parameters)
    assert found[-1] < found[0]
    assert all(bool(parameter.grad is not None and parameter.grad.abs().sum() > 0) for parameter in parameters)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items()), "the base stays as it is"


# peft 0.21 still calls transformers' older names, as gradient_checkpointing_enable.
@pytest.mark.filterwarnings("ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", RECIPES)
def test_peft_trains_on_the_artifact_as_its_card_says(name: str, artifacts: dict[str, Path]) -> None:
    torch.manual_seed(0)
    said = training(shipped.recipe(name), str(artifacts[name]), "AutoModelForCausalLM")
    code = re.findall(r"```python\n(.*?)```", said, re.S)
    assert len(code) == 1
    made: dict[str, Any] = {}
    exec(code[0], made)
    model = made["model"]
    assert isinstance(model, peft.PeftModel)
    model.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {"lora_" in name for name, one in model.named_parameters() if one.requires_grad} == {True}
    found = losses(model, parameters)
    assert found[-1] < found[0]
    assert all(bool(parameter.grad is not None and parameter.grad.abs().sum() > 0) for parameter in parameters)
