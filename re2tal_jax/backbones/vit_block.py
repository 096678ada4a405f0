"""The two branches of a VideoMAE block, run on tiles of clips: attention inside a clip, and an MLP on each token.

Modules hold parameters; a branch of a chain is a module with the workspace it may have (`AttentionBranch`,
`MlpBranch`). A state is (B, clips, N, C): clips and samples do not meet.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from re2tal_jax.backbones.attention import attend, split_heads
from re2tal_jax.backbones.layers import LayerNorm, Linear, Mlp
from re2tal_jax.backbones.tiles import GridTiles, plan_tiles
from re2tal_jax.chunks import count_chunks
from re2tal_jax.kept import keep

State = Float[Array, "B clips N C"]


class Block(nnx.Module):
    """The two branches of a transformer block; they are residual functions, without the sums around them."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        epsilon: float,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.attn = Attention(dim, num_heads, qkv_bias, epsilon, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), epsilon=epsilon, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Layer norm, then self-attention among all tokens of a clip."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, epsilon: float, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.num_heads, self.qkv_bias = num_heads, qkv_bias
        self.norm = LayerNorm(dim, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.qkv = Linear(dim, 3 * dim, use_bias=False, dtype=dtype, rngs=rngs)
        if qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros(dim, jnp.float32))
            self.v_bias = nnx.Param(jnp.zeros(dim, jnp.float32))
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: State, turns: int = 1) -> State:
        """Map (B, clips, N, C) to the same shape in the compute dtype.

        Heads attend in `turns` groups of one size, one after the other. They share nothing, so that nothing is summed
        over turns; autodiff keeps of a turn its queries, keys and values alone.
        """
        y = self.qkv(self.norm(x))
        if self.qkv_bias:
            q_bias, v_bias = self.q_bias[...], self.v_bias[...]
            y = y + jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(y.dtype)
        heads = self.num_heads // turns
        q, k, v = keep(split_heads(y, "b n t (g h d) -> g b n h t d", g=turns, h=heads))
        if turns == 1:
            y = attend(q, k, v)
        else:

            def one_turn(group: tuple[Array, Array, Array]) -> Array:
                return jax.checkpoint(attend, prevent_cse=False)(*group)

            y = lax.map(one_turn, (q, k, v))
        return self.proj(rearrange(y, "g b n h t d -> b n t (g h d)"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionBranch:
    """Attention inside clips; a tile is as many whole clips as `workspace` allows.

    Where the logits of all heads of one clip are more than that, as those of 1,568 tokens are (16 frames at 224 x 224),
    its heads attend in turn.
    """

    attention: Attention
    workspace: int = field(metadata={"static": True})

    def tiles(self, shape: tuple[int, ...]) -> GridTiles:
        """Return the tiles of a state (B, clips, N, C)."""
        _, clips, tokens, channels = shape
        logits = self.attention.num_heads // self._turns(tokens) * tokens
        per_token = logits + 4 * channels  # and q, k, v and what comes of them
        return plan_tiles((clips, tokens), (1, tokens), per_token, self.workspace)

    def __call__(
        self,
        x: State,
        *,
        key: PRNGKeyArray | None = None,
        aux: Any = None,
        tile: Int[Array, ""] | None = None,
    ) -> State:
        """Map a tile or a whole state to its shape in the compute dtype."""
        return self.attention(x, self._turns(x.shape[2]))

    def _turns(self, tokens: int) -> int:
        return count_chunks(self.attention.num_heads, tokens * tokens, self.workspace)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MlpBranch:
    """An MLP on each token; a tile is as many clips, or tokens of one clip, as `workspace` allows."""

    mlp: Mlp
    workspace: int = field(metadata={"static": True})

    def tiles(self, shape: tuple[int, ...]) -> GridTiles:
        """Return the tiles of a state (B, clips, N, C)."""
        _, clips, tokens, channels = shape
        return plan_tiles((clips, tokens), (1, 1), 2 * (self.mlp.fc1.out_features + channels), self.workspace)

    def __call__(
        self,
        x: State,
        *,
        key: PRNGKeyArray | None = None,
        aux: Any = None,
        tile: Int[Array, ""] | None = None,
    ) -> State:
        """Map a tile or a whole state to its shape in the compute dtype."""
        return self.mlp(x)
