"""VideoMAE's encoder: the original repositories (pre-training files too), mmaction2 and OpenTAD, Hugging Face."""

from checkpoints_convert.dialects.dialect import PREPROCESSING, Dialect, head
from checkpoints_convert.rules import Ignored, Rule

_DECODER = Ignored(r"(decoder|encoder_to_decoder)\..*|mask_token", "of pre-training's decoder")
_NORMS = {  # final_norm -> what its parameters are; a network has one of them or none
    "pooled": "the norm of the tokens' mean, before a classifier; only a network with final_norm='pooled' has it",
    "tokens": "the norm of the last tokens; only a network with final_norm='tokens' has it",
}
_SIZES = (
    "no key tells num_heads, num_frames and image_size (the last two make the table of positions): set them with "
    "--config.backbone.KEY=VALUE where they are not those of the published network"
)
_TABLE = {"pos_embed": "the fixed table of sines and cosines, which such files do not hold"}


def _final(name: str, final_norm: str, *, outside: bool = False) -> Rule:
    """Return the rule of a norm behind the last block, which is ours if the network is built with it."""
    return Rule(name, "norm", "norm", optional=_NORMS[final_norm], when=("final_norm", final_norm), outside=outside)


def _names(*, patch: str, fc1: str, fc2: str, final: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the names of the original repository, with what differs in others."""
    return (
        Rule(patch, "patch_embed.proj", "conv"),
        Rule("blocks.{i}.norm1", "blocks.{i}.attn.norm", "norm"),
        Rule("blocks.{i}.attn.qkv", "blocks.{i}.attn.qkv", "linear"),
        Rule("blocks.{i}.attn.q_bias", "blocks.{i}.attn.q_bias"),
        Rule("blocks.{i}.attn.v_bias", "blocks.{i}.attn.v_bias"),
        Rule("blocks.{i}.attn.proj", "blocks.{i}.attn.proj", "linear"),
        Rule("blocks.{i}.norm2", "blocks.{i}.mlp.norm", "norm"),
        Rule(f"blocks.{{i}}.{fc1}", "blocks.{i}.mlp.fc1", "linear"),
        Rule(f"blocks.{{i}}.{fc2}", "blocks.{i}.mlp.fc2", "linear"),
        *final,
    )


def _hugging_face() -> tuple[Rule, ...]:
    theirs, ours = "encoder.layer.{i}.", "blocks.{i}."
    attention = theirs + "attention.attention."
    return (
        Rule("embeddings.patch_embeddings.projection", "patch_embed.proj", "conv"),
        Rule(theirs + "layernorm_before", ours + "attn.norm", "norm"),
        *(
            Rule(f"{attention}{name}.weight", f"{ours}attn.qkv.kernel[{part}/3]", "matrix")
            for part, name in enumerate(("query", "key", "value"))
        ),
        Rule(attention + "q_bias", ours + "attn.q_bias"),
        Rule(attention + "v_bias", ours + "attn.v_bias"),
        # in files it is the above; transformers 5 calls them so in memory
        Rule(attention + "query.bias", ours + "attn.q_bias", read_only=True),
        Rule(attention + "value.bias", ours + "attn.v_bias", read_only=True),
        Rule(theirs + "attention.output.dense", ours + "attn.proj", "linear"),
        Rule(theirs + "layernorm_after", ours + "mlp.norm", "norm"),
        Rule(theirs + "intermediate.dense", ours + "mlp.fc1", "linear"),
        Rule(theirs + "output.dense", ours + "mlp.fc2", "linear"),
        _final("layernorm", "tokens"),
        _final("fc_norm", "pooled", outside=True),
    )


_BOTH = (_final("fc_norm", "pooled"), _final("norm", "tokens"))
VIDEOMAE = Dialect(
    "videomae",
    "vit",
    "the repositories VideoMAE and VideoMAEv2, fine-tuned",
    (
        *_names(patch="patch_embed.proj", fc1="mlp.fc1", fc2="mlp.fc2", final=_BOTH),
        Rule("pos_embed", "pos_embed", "table", read_only=True),
    ),
    (head("head"),),
    computed=_TABLE,
    note=_SIZES,
)
PRETRAINED = Dialect(
    "videomae_pretrain",
    "vit",
    "the repositories VideoMAE and VideoMAEv2, the encoder of a pre-training file",
    _names(patch="patch_embed.proj", fc1="mlp.fc1", fc2="mlp.fc2", final=(_final("norm", "tokens"),)),
    (_DECODER,),
    prefixes=("encoder.",),
    computed=_TABLE,
    note=_SIZES,
)
MMACTION2 = Dialect(
    "mmaction2",
    "vit",
    "mmaction2's VisionTransformer, OpenTAD's VisionTransformerCP",
    (
        Rule("pos_embed", "pos_embed", "table"),
        *_names(patch="patch_embed.projection", fc1="mlp.layers.0.0", fc2="mlp.layers.1", final=_BOTH),
    ),
    (head("cls_head"), PREPROCESSING),
    prefixes=("backbone.", ""),
)
HUGGING_FACE = Dialect(
    "huggingface",
    "vit",
    "transformers' VideoMAEModel and what holds one",
    _hugging_face(),
    (_DECODER, head("classifier")),
    prefixes=("videomae.", ""),
    options={"norm_epsilon": 1e-12},  # of transformers' VideoMAEConfig; the original networks have 1e-6
    computed=_TABLE,
    note=_SIZES,
)
DIALECTS = (VIDEOMAE, PRETRAINED, MMACTION2, HUGGING_FACE)
