"""Builds a small multimodal checkpoint as publishers do: a trained text model, a random tower, a processor's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.workers.jobs import ZOO
from workers.checkpoint.source import Source
from workers.model.forward import Streaming
from workers.model.loading import StreamedModel
from workers.model.statistics import Observer

TEXT = ZOO / "models" / "llama-tiny"
IMAGE = "<image>"
SIDE, PATCH = 32, 8


def save_llava(folder: Path) -> Path:
    """Save a ``LlavaForConditionalGeneration`` in bfloat16 around llama-tiny, whose tower sees pictures of 32 x 32."""
    torch.manual_seed(0)
    text = tf.AutoModelForCausalLM.from_pretrained(TEXT)
    tokenizer = tf.AutoTokenizer.from_pretrained(TEXT)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vision = tf.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=text.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    model = tf.LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    # Features as large as embeddings are, so that what the tower says matters.
    scale = text.get_input_embeddings().weight.float().std()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.normal_(0, float(scale) * 4)
    model.save_pretrained(folder)
    images = tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = tf.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: image-text-to-text\n---\n")
    return folder


def save_qwen2_audio(folder: Path) -> Path:
    """Save a random ``Qwen2AudioForConditionalGeneration`` in bfloat16, which hears a second of sound at 16 kHz."""
    torch.manual_seed(0)
    tokenizer = tf.AutoTokenizer.from_pretrained(TEXT)
    marks = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    text = {
        "model_type": "qwen2", "vocab_size": 2048 + 64, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    ears = {
        "model_type": "qwen2_audio_encoder", "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64, "d_model": 32, "max_source_positions": 50,
    }  # fmt: skip
    config = tf.Qwen2AudioConfig(
        audio_config=ears, text_config=text, audio_token_index=tokenizer.convert_tokens_to_ids(marks[0])
    )
    model = tf.Qwen2AudioForConditionalGeneration(config).to(torch.bfloat16)
    with torch.no_grad():  # features as large as embeddings are
        model.get_submodule(projector_of(model)).linear.weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    hears = tf.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    tf.Qwen2AudioProcessor(feature_extractor=hears, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def projector_of(model: torch.nn.Module) -> str:
    """The name of the module between tower and text model."""
    return next(name for name, _ in model.named_modules() if name.endswith("multi_modal_projector"))


def save_gemma3(folder: Path) -> Path:
    """Save a random ``Gemma3ForConditionalGeneration`` in bfloat16, with the names that its publisher gives towers."""
    torch.manual_seed(0)
    text = tf.Gemma3TextConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        query_pre_attn_scalar=16,  # llama.cpp takes the heads' width for it
    )  # fmt: skip
    vision = tf.SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    config = tf.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5, boi_token_index=6,
        eoi_token_index=7,
    )  # fmt: skip
    tf.Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    named = {key.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor for key, tensor in weights.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TEXT / name, folder / name)
    picture = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(picture))
    return folder


def same_statistics(folder: Path, whole: Any, shown: Sequence[dict[str, Tensor]]) -> int:
    """Assert that X^T X of every down_proj, streamed, is that of transformers' own forward; how many were compared.

    ``shown`` are the inputs of one sequence each, ``whole`` is the model as transformers loads it.
    """
    grams: dict[str, Tensor] = {}

    def seen(name: str) -> Callable[[Any, Any], None]:
        def hook(module: Any, args: Any) -> None:
            flat = args[0].flatten(0, -2).float()
            grams[name] = grams.get(name, 0) + flat.T @ flat

        return hook

    for name, module in whole.named_modules():
        if name.endswith("mlp.down_proj"):
            module.register_forward_pre_hook(seen(name))
    with torch.no_grad():
        for inputs in shown:
            whole(**inputs, use_cache=False)
    compared = 0
    with Source(folder) as source:
        streamed = StreamedModel(folder, source, dtype=torch.float32)
        with Streaming(streamed) as streaming:
            lanes = streaming.lanes(shown)
            for layer in streaming.layers():
                observer = Observer("routed", 128)
                with observer.watch(streamed, layer.index):
                    lanes.advance()
                for weight in streamed.weights:
                    if weight.layer == layer.index and "down_proj" in weight.key:
                        ours, theirs = observer.of(weight.input), grams[weight.input.parameter.removesuffix(".weight")]
                        assert ours is not None
                        torch.testing.assert_close(ours.gram_II, theirs, rtol=1e-4, atol=1e-4)
                        compared += 1
    return compared
