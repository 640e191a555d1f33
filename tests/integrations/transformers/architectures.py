"""Tiny models of many architectures of transformers, with random weights, and for each of them batches with padding of every form.

A table: an architecture is a class of transformers and what its configuration needs to be tiny; a function for each kind of input makes
the batches. Nothing here compares anything; `outcome` says what `varlen_attn.enable` makes of an architecture, for tests and for docs.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import varlen_attn

Kind = Literal["encoder", "decoder", "encoder-decoder", "audio", "vision"]
Config = Mapping[str, Any]

# -------------------------------------------------------------------- sizes

# An output is told by its shape: of B, the numbers of columns, and the sizes of everything else, no two are equal.
B, S, TARGETS, SAMPLES = 4, 11, 7, 160
VOCABULARY, PAD, END, IMAGE, CLASSES = 99, 0, 2, 98, 3

TINY: Config = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=END,
    num_labels=CLASSES,
)
GROUPED: Config = dict(num_key_value_heads=2)
HEADS_OF_8: Config = dict(**GROUPED, head_dim=8)
WINDOW: Config = dict(sliding_window=4)
WINDOW_FIRST: Config = dict(**WINDOW, layer_types=["sliding_attention", "full_attention"])
GEMMA2: Config = dict(**HEADS_OF_8, **WINDOW_FIRST, query_pre_attn_scalar=8, attn_logit_softcapping=2.0)
LLAMA4: Config = dict(**HEADS_OF_8, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48)
RANKS: Config = dict(embedding_size=32)
DISTILBERT: Config = dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4)
MODERNBERT: Config = dict(local_attention=4, global_attn_every_n_layers=2)
DEBERTA: Config = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)
BART: Config = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    decoder_start_token_id=END,
    forced_eos_token_id=None,
)
T5: Config = dict(
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    decoder_start_token_id=PAD,
)
WAV2VEC2: Config = dict(
    conv_dim=(16, 16),
    conv_kernel=(8, 4),
    conv_stride=(4, 2),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    num_codevectors_per_group=4,
    codevector_dim=16,
    proj_codevector_dim=16,
    classifier_proj_size=16,
)
LAYER_NORM: Config = dict(feat_extract_norm="layer", do_stable_layer_norm=True)
SPEECH: Config = dict(**BART, max_source_positions=S, max_target_positions=16)
IMAGES: Config = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4)
QWEN2_VL_TEXT: Config = dict(**TINY, **GROUPED, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4))
QWEN2_VL_VISION: Config = dict(
    depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2
)

# -------------------------------------------------------------------- padding

FORMS = (
    "right",
    "right, with hidden states",
    "right, with cache",
    "left",
    "left, with positions",
    "left, with cache",
    "both",
    "holes",
    "all ones",
    "no mask",
    "4-D bool",
    "4-D float",
    "one empty row",
)
# Where padding stands behind all tokens, outputs without columns (a pooled vector, a class, a loss) mean something as well.
_POOLED = ("right", "all ones", "no mask", "4-D", "one empty row")


@dataclass(frozen=True)
class Case:
    """One batch.

    Attributes:
        arguments: of the model's forward.
        valid: by number of columns, ``(B, columns)``, True where an output means something.
        rows: ``(B,)``, True where outputs without columns mean something too.
    """

    arguments: Config
    valid: Mapping[int, Tensor]
    rows: Tensor


def padding(form: str, columns: int = S) -> Tensor:
    """``(B, columns)``, True at tokens. One row is full, another has one token."""
    lengths = torch.tensor([columns, columns // 3, columns * 2 // 3, 1])[:, None]
    column = torch.arange(columns).expand(B, -1)
    if form.startswith("left"):
        return column >= columns - lengths
    if form == "both":
        first = torch.tensor([[0], [1], [2], [columns // 2]])
        return (column >= first) & (column < (first + lengths).clamp(max=columns - 1))
    if form == "holes":
        steps = torch.tensor([[3], [5], [7], [2]])
        return (column * steps % 8 < 4) & (column > torch.tensor([[-1], [1], [0], [-1]]))
    if form in ("all ones", "no mask"):
        return column >= 0
    empty = torch.tensor([[False], [False], [form == "one empty row"], [False]])
    return (column < lengths) & ~empty


def mask_argument(form: str, mask: Tensor, causal: bool) -> Tensor | None:
    if form == "no mask":
        return None
    if not form.startswith("4-D"):
        return mask.long()
    square = mask[:, None, None, :].expand(-1, -1, mask.shape[1], -1)
    square = square.tril() if causal else square.clone()
    return square if form == "4-D bool" else torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)


def meant(form: str, mask: Tensor) -> Tensor:
    """Where outputs mean something: at tokens, but in a 4-D mask no query is padding."""
    return torch.ones_like(mask) if form.startswith("4-D") else mask


def tokens(mask: Tensor, seed: int = 0) -> Tensor:
    """Random token ids, the last one of a row its end; the pad token where nothing is."""
    ids = torch.randint(3, VOCABULARY - 9, mask.shape, generator=torch.Generator().manual_seed(seed))
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return ids.masked_fill(last, END).masked_fill(~mask, PAD)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------- batches; None where an architecture has no such form

Inputs = Callable[["Architecture", PreTrainedModel, str], Case | None]


def text(entry: Architecture, model: PreTrainedModel, form: str) -> Case | None:
    known = inspect.signature(model.forward).parameters
    if "attention_mask" not in known and form != "no mask":
        return None
    causal = entry.kind == "decoder"
    if (not causal and "cache" in form) or ("positions" in form and not (causal and "position_ids" in known)):
        return None
    mask = padding(form)
    arguments: dict[str, Any] = {"input_ids": tokens(mask), **_labels(entry, mask)}
    if "attention_mask" in known:
        arguments["attention_mask"] = mask_argument(form, mask, causal)
    if "positions" in form:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if causal:
        arguments["use_cache"] = "cache" in form
    # These look for the last token themselves, wherever it is.
    pooled = causal and entry.class_name.endswith("SequenceClassification")
    return _case(form, arguments, {S: meant(form, mask)}, pooled=pooled)


def targets(entry: Architecture, model: PreTrainedModel, form: str) -> Case | None:
    """A causal decoder, its cross-attention over states that are given."""
    if "positions" in form:
        return None
    mask, memory = padding(form, TARGETS), padding("right" if form.startswith("4-D") else form)
    arguments = {
        "input_ids": tokens(mask),
        "attention_mask": mask_argument(form, mask, causal=True),
        "encoder_hidden_states": noise(B, S, 32),
        "encoder_attention_mask": None if form == "no mask" else memory.long(),
        "use_cache": "cache" in form,
        **_labels(entry, mask),
    }
    return _case(form, arguments, {TARGETS: meant(form, mask)})


def text_to_text(entry: Architecture, model: PreTrainedModel, form: str) -> Case | None:
    """The decoder's mask has the form; the encoder's too, unless the form is 4-D: that would not fit the cross-attention."""
    source = padding("right" if form.startswith("4-D") else form)
    arguments = {"input_ids": tokens(source), "attention_mask": None if form == "no mask" else source.long()}
    return _with_targets(entry, form, arguments, source)


def classified_text(entry: Architecture, model: PreTrainedModel, form: str) -> Case | None:
    """An encoder-decoder that makes its targets of its sources, and gives its decoder no mask."""
    if form.startswith("4-D") or "positions" in form or "cache" in form:
        return None
    mask = padding(form)
    arguments = {"input_ids": tokens(mask), "attention_mask": mask_argument(form, mask, causal=False), **_labels(entry, mask)}
    return _case(form, arguments, {S: mask})


def speech_to_text(entry: Architecture, model: PreTrainedModel, form: str) -> Case | None:
    if "left" in form or form in ("both", "holes"):
        return None  # recordings begin at the first column
    mask_form = "right" if form.startswith("4-D") else form
    if entry.family == "whisper":
        mask, source = padding(mask_form, 2 * S), padding("no mask")  # its encoder knows no padding
        arguments: dict[str, Any] = {"input_features": noise(B, 6, 2 * S)}
    elif entry.family == "speech_to_text":
        mask = padding(mask_form, 4 * S)
        source = model.get_encoder()._get_feature_vector_attention_mask(S, mask.long()).bool()
        arguments = {"input_features": noise(B, 4 * S, 6)}
    else:
        mask = padding(mask_form, 384 * S + 512)
        source = mask[:, ::384][:, :S]  # as the encoder does it
        arguments = {"input_values": noise(*mask.shape).masked_fill(~mask, 0)}
    arguments["attention_mask"] = None if form == "no mask" else mask.long()
    return _with_targets(entry, form, arguments, source)


def _with_targets(entry: Architecture, form: str, arguments: dict[str, Any], source: Tensor) -> Case | None:
    if "positions" in form:
        return None
    mask = padding(form, TARGETS)
    arguments |= {
        "decoder_input_ids": tokens(mask, seed=1),
        "decoder_attention_mask": mask_argument(form, mask, causal=True),
        "use_cache": "cache" in form,
        **_labels(entry, mask),
    }
    return _case(form, arguments, {S: source, TARGETS: meant(form, mask)})


def waves(entry: Architecture, model: PreTrainedModel, form: str) -> Case | None:
    if not _recorded(form):
        return None
    mask = padding(form, SAMPLES)
    mask[:, :40] |= mask[:, :1]  # the shortest recording has a few frames
    frames = int(model._get_feat_extract_output_lengths(SAMPLES))
    valid = model._get_feature_vector_attention_mask(frames, mask.long()).bool() & mask.any(1, keepdim=True)
    arguments = {"input_values": noise(B, SAMPLES).masked_fill(~mask, 0), **_labels(entry, mask)}
    squeeze = getattr(model.config, "squeeze_factor", 1)  # SEW's layers see pooled frames
    pooled = valid[:, : frames // squeeze * squeeze].unflatten(1, (-1, squeeze)).any(2)
    return _case(form, arguments | {"attention_mask": mask_argument(form, mask, causal=False)}, {frames: valid, pooled.shape[1]: pooled})


def features(entry: Architecture, model: PreTrainedModel, form: str) -> Case | None:
    if not _recorded(form):
        return None
    subsampled = entry.family == "parakeet_encoder"
    mask = padding(form, 4 * S if subsampled else S)
    valid = model._get_output_attention_mask(mask.long(), target_length=S).bool() if subsampled else mask
    arguments = {"input_features": noise(B, mask.shape[1], 16), "attention_mask": mask_argument(form, mask, causal=False)}
    return _case(form, arguments, {S: valid & mask.any(1, keepdim=True)})


def _recorded(form: str) -> bool:
    """Recordings begin at the first column, and their masks have one entry for each sample."""
    return form in ("right", "right, with hidden states", "all ones", "no mask", "one empty row")


def spectrogram(entry: Architecture, model: PreTrainedModel, form: str) -> Case | None:
    return _case(form, {"input_values": noise(B, 16, 8)}, {}) if form == "no mask" else None


def images(entry: Architecture, model: PreTrainedModel, form: str) -> Case | None:
    return _case(form, {"pixel_values": noise(B, 3, 8, 8)}, {}) if form == "no mask" else None


def text_and_images(entry: Architecture, model: PreTrainedModel, form: str) -> Case | None:
    if "cache" in form or "positions" in form:
        return None
    mask = padding(form)
    arguments = {"input_ids": tokens(mask), "attention_mask": mask_argument(form, mask, causal=entry.family == "clip")}
    case = _case(form, arguments | {"pixel_values": noise(B, 3, 8, 8)}, {S: meant(form, mask)})
    return replace(case, rows=case.rows & (form != "one empty row"))  # every image is compared with every text


def images_in_text(entry: Architecture, model: PreTrainedModel, form: str) -> Case | None:
    """Four tokens of an image at the first four tokens of every row that has room for them."""
    if "positions" in form:
        return None  # those of Qwen2-VL have three axes, and are made from the mask
    mask = padding(form)
    place = mask & (mask.cumsum(1) <= 4) & (mask.sum(1, keepdim=True) > 4)
    number = int(place.any(1).sum())
    arguments: dict[str, Any] = {
        "input_ids": tokens(mask).masked_fill(place, IMAGE),
        "attention_mask": mask_argument(form, mask, causal=True),
        "use_cache": "cache" in form,
        **_labels(entry, mask),
    }
    if entry.family == "qwen2_vl":
        arguments |= {"pixel_values": noise(16 * number, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * number)}
        arguments |= {"mm_token_type_ids": place.long()}
    else:
        arguments["pixel_values"] = noise(number, 3, 8, 8)
    return _case(form, arguments, {S: meant(form, mask)})


def _labels(entry: Architecture, mask: Tensor) -> dict[str, Tensor]:
    """What a head needs to compute its loss."""
    name = entry.class_name
    drawn = torch.randint(3, VOCABULARY - 9, mask.shape, generator=torch.Generator().manual_seed(2))
    if name.endswith("SequenceClassification"):
        return {"labels": drawn[:, 0] % 2}
    if name.endswith("TokenClassification"):
        return {"labels": (drawn % CLASSES).masked_fill(~mask, -100)}
    if name.endswith("QuestionAnswering"):
        return {"start_positions": torch.zeros(B, dtype=torch.long), "end_positions": mask.long().sum(1).sub(1).clamp(min=0)}
    if name.endswith("CTC"):
        return {"labels": drawn[:, :2]}
    if name.endswith(("MaskedLM", "CausalLM", "LMHeadModel", "ConditionalGeneration")):
        return {"labels": drawn.masked_fill(~mask, -100)}
    return {}


def _case(form: str, arguments: Config, valid: Mapping[int, Tensor], pooled: bool = False) -> Case:
    more = {"output_hidden_states": True} if "hidden states" in form else {}
    rows = padding(form).any(1) & (pooled or form.startswith(_POOLED))
    return Case({**arguments, **more}, valid, rows)


# -------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Architecture:
    """One row: a class of transformers, and after a comma what is special about its configuration."""

    name: str
    kind: Kind
    inputs: Inputs
    config: Config

    @property
    def class_name(self) -> str:
        return self.name.split(",")[0]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.class_name)  # type: ignore[no-any-return]

    @property
    def exists(self) -> bool:
        """Whether the installed transformers has this class and takes the configuration. Some versions check the types of a few wrongly."""
        try:
            self.model_class.config_class(**self.config)
        except (AttributeError, StrictDataclassError):
            return False
        return True

    @property
    def family(self) -> str:
        return str(self.model_class.config_class.model_type)

    @property
    def reference(self) -> str:
        """The implementation that is the reference, and transformers' own choice: "eager" where "sdpa" is not supported."""
        return "sdpa" if self.model_class._supports_sdpa else "eager"

    @property
    def generates(self) -> bool:
        texts = self.inputs in (text, text_to_text) and self.kind in ("decoder", "encoder-decoder")
        return texts and bool(self.model_class.can_generate())

    def build(self) -> PreTrainedModel:
        """The same random weights in every call, large enough that attention is far from uniform, and no bias is 0."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.model_class(self.model_class.config_class(**self.config)).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0.0, 0.15)
                    else:
                        parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model

    def case(self, model: PreTrainedModel, form: str) -> Case | None:
        """The batch of a form; None where the architecture has no such form."""
        if form == "4-D bool" and self.reference == "eager":
            return None  # eager attention adds the mask: a bool one is nothing that means something
        return self.inputs(self, model, form)


def _rows(kind: Kind, inputs: Inputs, base: Config, table: Mapping[str, Config]) -> dict[str, Architecture]:
    rows = {name: Architecture(name, kind, inputs, {**base, **config}) for name, config in table.items()}
    return {name: row for name, row in rows.items() if row.exists}


ARCHITECTURES: dict[str, Architecture] = {
    **_rows(
        "encoder",
        text,
        TINY,
        {
            "BertModel": {},
            "BertForMaskedLM": {},
            "BertForSequenceClassification": {},
            "BertForTokenClassification": {},
            "BertForQuestionAnswering": dict(num_labels=2),
            "RobertaModel": {},
            "XLMRobertaModel": {},
            "CamembertModel": {},
            "ErnieModel": {},
            "ElectraModel": RANKS,
            "AlbertModel": dict(embedding_size=16),
            "DistilBertModel": DISTILBERT,
            "DistilBertForQuestionAnswering": dict(**DISTILBERT, num_labels=2),
            "EsmModel": dict(position_embedding_type="rotary", mask_token_id=3),
            "LayoutLMModel": {},
            "DPRContextEncoder": {},
            "ClapTextModel": {},
            "SplinterModel": {},
            "ModernBertModel": MODERNBERT,
            "ModernBertForSequenceClassification, mean": dict(**MODERNBERT, classifier_pooling="mean"),
            "NomicBertModel": {},
            "JinaEmbeddingsV3Model": {},
            "EuroBertModel": GROUPED,
            "T5EncoderModel": T5,
            "CLIPTextModel": {},
            "SiglipTextModel": {},
            "ConvBertModel": dict(**RANKS, conv_kernel_size=3, head_ratio=2),
            "MPNetModel": {},
            "DebertaModel": DEBERTA,
            "DebertaV2Model": DEBERTA,
            "RoFormerModel": RANKS,
            "RemBertModel": dict(input_embedding_size=16, output_embedding_size=16),
            "MegatronBertModel": {},
            "SqueezeBertModel": dict(**RANKS, q_groups=2, k_groups=2, v_groups=2, intermediate_groups=2, output_groups=2),
            "NystromformerModel": dict(num_landmarks=S, segment_means_seq_len=S, conv_kernel_size=3),
            "FNetModel": {},
            "LongformerModel": dict(attention_window=4),
            "BigBirdModel": dict(block_size=1, num_random_blocks=1),
        },
    ),
    **_rows(
        "encoder",
        text,
        dict(vocab_size=VOCABULARY, pad_token_id=PAD),
        {
            "FunnelModel": dict(block_sizes=[1, 1], num_decoder_layers=1, d_model=32, n_head=4, d_head=8, d_inner=48),
            "XLNetModel": dict(d_model=32, n_layer=2, n_head=4, d_inner=48),
            "XLMModel": dict(n_words=VOCABULARY, emb_dim=32, n_layers=2, n_heads=4, pad_index=PAD),
        },
    ),
    **_rows(
        "decoder",
        text,
        TINY,
        {
            "LlamaModel": GROUPED,
            "LlamaForCausalLM": GROUPED,
            "LlamaForSequenceClassification": GROUPED,
            "MistralForCausalLM": dict(**GROUPED, **WINDOW),
            "MistralForTokenClassification": dict(**GROUPED, **WINDOW),
            "Qwen2ForCausalLM": GROUPED,
            "Qwen3ForCausalLM": HEADS_OF_8,
            "GemmaForCausalLM": dict(head_dim=8, num_key_value_heads=1),
            "Gemma2ForCausalLM": GEMMA2,
            "Gemma3ForCausalLM": dict(**HEADS_OF_8, **WINDOW_FIRST, query_pre_attn_scalar=8),
            "Gemma3nForCausalLM": dict(
                **HEADS_OF_8,
                **WINDOW_FIRST,
                vocab_size_per_layer_input=VOCABULARY,
                hidden_size_per_layer_input=8,
                altup_num_inputs=2,
                laurel_rank=4,
                num_kv_shared_layers=0,
                activation_sparsity_pattern=[0.0, 0.0],
            ),
            "GptOssForCausalLM": dict(**HEADS_OF_8, **WINDOW_FIRST, num_local_experts=4, num_experts_per_tok=2),
            "GPT2LMHeadModel": {},
            "GPT2ForSequenceClassification": {},
            "GPTNeoXForCausalLM": {},
            "PhiForCausalLM": GROUPED,
            "Phi3ForCausalLM": dict(**GROUPED, **WINDOW),
            "OPTForCausalLM": dict(ffn_dim=48, word_embed_proj_dim=32),
            "BloomForCausalLM": {},
            "FalconForCausalLM": dict(alibi=True, new_decoder_architecture=False, multi_query=True),
            "FalconForCausalLM, rotary": dict(alibi=False, new_decoder_architecture=True, num_kv_heads=2),
            "GPTJForCausalLM": dict(rotary_dim=4),
            "GPTNeoForCausalLM": dict(attention_types=[[["global", "local"], 1]], num_layers=2, window_size=4),
            "Olmo2ForCausalLM": GROUPED,
            "Olmo3ForCausalLM": dict(**GROUPED, **WINDOW_FIRST),
            "CohereForCausalLM": GROUPED,
            "Cohere2ForCausalLM": dict(**GROUPED, **WINDOW_FIRST),
            "GraniteForCausalLM": dict(**GROUPED, attention_multiplier=0.3),
            "StableLmForCausalLM": GROUPED,
            "Starcoder2ForCausalLM": dict(**GROUPED, **WINDOW),
            "SmolLM3ForCausalLM": dict(**GROUPED, no_rope_layers=[1, 0]),
            "BioGptForCausalLM": {},
            "PersimmonForCausalLM": {},
            "DiffLlamaForCausalLM": GROUPED,
            "DogeForCausalLM": GROUPED,
            "XGLMForCausalLM": dict(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
            "MixtralForCausalLM": dict(**GROUPED, num_local_experts=4),
            "DeepseekV3ForCausalLM": dict(
                num_key_value_heads=4,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=4,
                qk_nope_head_dim=4,
                v_head_dim=8,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=2,
                topk_group=1,
                first_k_dense_replace=1,
                moe_intermediate_size=16,
            ),
            "Llama4ForCausalLM": dict(**LLAMA4, layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0]),
            "Llama4ForCausalLM, full attention first": dict(
                **LLAMA4, layer_types=["full_attention", "chunked_attention"], no_rope_layers=[0, 1]
            ),
            "ModernBertDecoderForCausalLM": MODERNBERT,
            "Qwen3NextForCausalLM": dict(
                **HEADS_OF_8,
                layer_types=["linear_attention", "full_attention"],
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
            ),
            "JambaForCausalLM": dict(
                **GROUPED,
                attn_layer_period=2,
                attn_layer_offset=1,
                expert_layer_period=2,
                expert_layer_offset=1,
                num_experts=4,
                mamba_d_state=8,
                mamba_dt_rank=4,
            ),
            "Lfm2ForCausalLM": dict(**GROUPED, layer_types=["conv", "full_attention"]),
            "RecurrentGemmaForCausalLM": dict(**HEADS_OF_8, attention_window_size=4, block_types=["recurrent", "attention"], lru_width=32),
            "FalconH1ForCausalLM": dict(**HEADS_OF_8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8),
            "Zamba2ForCausalLM": dict(
                layers_block_type=["mamba", "hybrid"],
                n_mamba_heads=8,
                mamba_headdim=8,
                mamba_d_state=8,
                mamba_ngroups=2,
                chunk_size=8,
            ),
            "MambaForCausalLM": dict(state_size=8, time_step_rank=4),
            "Mamba2ForCausalLM": dict(num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=8),
        },
    ),
    **_rows("decoder", targets, TINY, {"BertLMHeadModel, with cross-attention": dict(is_decoder=True, add_cross_attention=True)}),
    **_rows(
        "encoder-decoder",
        text_to_text,
        TINY,
        {
            "BartModel": BART,
            "BartForConditionalGeneration": BART,
            "MBartModel": BART,
            "MarianModel": BART,
            "PegasusModel": BART,
            "M2M100Model": BART,
            "LEDModel": dict(**BART, attention_window=4, max_encoder_position_embeddings=64),
            "T5Model": T5,
            "T5ForConditionalGeneration": T5,
            "T5Model, gated": dict(**T5, feed_forward_proj="gated-gelu"),
            "MT5Model": T5,
            "UMT5Model": T5,
            "LongT5Model": T5,
            "SwitchTransformersModel": dict(**T5, num_experts=4),
        },
    ),
    **_rows("encoder-decoder", classified_text, TINY, {"BartForSequenceClassification": BART}),
    **_rows(
        "encoder-decoder",
        text_to_text,
        dict(vocab_size=VOCABULARY),
        {
            "EncoderDecoderModel": dict(
                encoder=dict(model_type="bert", **TINY),
                decoder=dict(model_type="bert", **TINY, is_decoder=True, add_cross_attention=True),
                decoder_start_token_id=1,
                pad_token_id=PAD,
            ),
            "T5GemmaModel": dict(
                encoder={**TINY, **GEMMA2}, decoder={**TINY, **GEMMA2, "is_decoder": True, "cross_attention_hidden_size": 32}
            ),
        },
    ),
    **_rows(
        "encoder-decoder",
        speech_to_text,
        TINY,
        {
            "WhisperModel": dict(**SPEECH, num_mel_bins=6, suppress_tokens=None, begin_suppress_tokens=None),
            "Speech2TextModel": dict(
                **SPEECH, input_feat_per_channel=6, input_channels=1, conv_channels=16, num_conv_layers=2, conv_kernel_sizes=(3, 3)
            ),
            "MoonshineModel": dict(
                encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4
            ),
        },
    ),
    **_rows(
        "audio",
        waves,
        {**TINY, **WAV2VEC2},
        {
            "Wav2Vec2Model": {},
            "Wav2Vec2Model, layer norm": LAYER_NORM,
            "Wav2Vec2Model, adapter": dict(add_adapter=True, num_adapter_layers=1, output_hidden_size=32),
            "Wav2Vec2ForCTC": {},
            "Wav2Vec2ForAudioFrameClassification": {},
            "Wav2Vec2ForXVector": dict(tdnn_dim=(16, 16), tdnn_kernel=(2, 1), tdnn_dilation=(1, 1), xvector_output_dim=16),
            "Wav2Vec2ForSequenceClassification": {},
            "HubertModel": {},
            "HubertForSequenceClassification": LAYER_NORM,
            "UniSpeechModel": {},
            "UniSpeechSatModel": LAYER_NORM,
            "Data2VecAudioModel": dict(num_conv_pos_embeddings=2, conv_pos_kernel_size=3),
            "SEWModel": dict(squeeze_factor=2),
            "Wav2Vec2ConformerModel": dict(position_embeddings_type="relative"),
            "Wav2Vec2ConformerModel, rotary": dict(position_embeddings_type="rotary"),
            "WavLMModel": {},
        },
    ),
    **_rows(
        "audio",
        features,
        TINY,
        {
            "Wav2Vec2BertModel": dict(
                feature_projection_input_dim=16,
                conv_depthwise_kernel_size=3,
                left_max_position_embeddings=4,
                right_max_position_embeddings=3,
            ),
            "ParakeetEncoder": dict(num_mel_bins=16, subsampling_conv_channels=8, subsampling_factor=4, conv_kernel_size=3),
        },
    ),
    **_rows("audio", spectrogram, IMAGES, {"ASTModel": dict(max_length=16, num_mel_bins=8, frequency_stride=4, time_stride=4)}),
    **_rows("vision", images, IMAGES, {"ViTModel": {}, "Dinov2Model": dict(mlp_ratio=2)}),
    **_rows(
        "vision",
        text_and_images,
        dict(text_config=TINY, vision_config=IMAGES),
        {"CLIPModel": dict(projection_dim=16), "SiglipModel": {}},
    ),
    **_rows(
        "vision",
        images_in_text,
        dict(image_token_id=IMAGE),
        {
            "LlavaForConditionalGeneration": dict(
                text_config=dict(model_type="llama", **TINY, **GROUPED), vision_config=dict(model_type="clip_vision_model", **IMAGES)
            ),
            "Qwen2VLForConditionalGeneration": dict(
                text_config=QWEN2_VL_TEXT,
                vision_config=QWEN2_VL_VISION,
                video_token_id=97,
                vision_start_token_id=96,
                vision_end_token_id=95,
            ),
        },
    ),
}


# -------------------------------------------------------------------- what becomes of them

Outcomes = Literal["left alone", "dense", "attention", "packed once"]  # from the least to the most


@dataclass(frozen=True)
class Outcome:
    """What `varlen_attn.enable` made of an architecture: a row of a table.

    Attributes:
        level: what was seen to happen to a batch padded on the right. "packed once": linear layers computed fewer rows; "attention":
            attention alone was computed without padding, somewhere; "dense": it was computed with padding, or there was none;
            "left alone": nothing was converted.
        reasons: why not more, in the words of the report and of the record.
    """

    name: str
    family: str
    kind: Kind
    level: Outcomes
    reasons: tuple[str, ...]


def outcome(name: str) -> Outcome:
    """Enable an architecture, run a batch padded on the right (without padding where it has no mask), and look at what was computed."""
    entry = ARCHITECTURES[name]
    model = entry.build()
    case = entry.case(model, "right") or entry.case(model, "no mask")
    assert case is not None
    before = _linear_rows(model, case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", varlen_attn.VarlenWarning)
        report = varlen_attn.enable(model)
    with varlen_attn.record(model) as log:
        after = _linear_rows(model, case)
    attention: Outcomes = "attention" if any(call.backend != "dense" for call in log) else "dense"
    level: Outcomes = "packed once" if after < before else attention if report.converted else "left alone"
    reasons = dict.fromkeys(x for x in (*(m.reason for m in report.left_alone), *(call.reason for call in log)) if x)
    return Outcome(name, entry.family, entry.kind, level, tuple(reasons))


def _linear_rows(model: PreTrainedModel, case: Case) -> int:
    """How many rows all linear layers together compute. A hook of all modules, for with hooks of their own they would compute padding."""
    rows = 0

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += args[0].numel() // args[0].shape[-1] if isinstance(module, nn.Linear | Conv1D) else 0

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        with torch.no_grad():
            model(**case.arguments)
    finally:
        handle.remove()
    return rows
