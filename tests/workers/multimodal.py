"""Builds a small multimodal checkpoint as publishers do: a trained text model, a random tower, a processor's files."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf

from tests.workers.jobs import ZOO

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
