"""The models whose layers are measured."""

from __future__ import annotations

from typing import NamedTuple

from jindo_core.falcon import FalconConfig
from jindo_core.model import LlamaConfig


class Shape(NamedTuple):
    """A LLaMA's numbers: hidden C, MLP width I, layers, query heads, key/value heads, vocabulary V."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocab: int = 32000

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The two kinds of weight that make most of a layer: name -> [N, K]."""
        return {"attention": (self.hidden, self.hidden), "mlp": (self.inner, self.hidden)}

    @property
    def linear_weights(self) -> int:
        """Weights of all layers' linears."""
        head_dim = self.hidden // self.heads
        attention = 2 * self.hidden * head_dim * (self.heads + self.groups)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.groups,
            head_dim=self.hidden // self.heads, max_position_embeddings=8192, rms_norm_eps=1e-5,
        )  # fmt: skip


class FalconShape(NamedTuple):
    """A Falcon's numbers, as `Shape`; norms: before a layer's halves, one for both or one each."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    norms: int
    vocab: int = 65024

    def config(self) -> FalconConfig:
        return FalconConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, ffn_hidden_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.groups, norms=self.norms,
        )  # fmt: skip


FALCONS = {
    shape.name: shape
    for shape in (
        FalconShape("falcon-110m", 768, 3072, 12, 12, 1, 1, 32000),
        FalconShape("falcon-7b", 4544, 18176, 32, 71, 1, 1),
        FalconShape("falcon-40b", 8192, 32768, 60, 128, 8, 2),
    )
}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 128, 2, 4, 2, 256),  # for the tests of this folder
        Shape("135m", 576, 1536, 30, 9, 3, 49152),  # SmolLM2
        Shape("110m", 768, 2048, 12, 12, 12),
        Shape("1b", 2048, 5632, 22, 32, 4),  # TinyLlama
        Shape("7b", 4096, 11008, 32, 32, 32),
        Shape("8b", 4096, 14336, 32, 32, 8, 128256),
        Shape("13b", 5120, 13824, 40, 40, 40),
        Shape("33b", 6656, 17920, 60, 52, 52),
        Shape("65b", 8192, 22016, 80, 64, 64),
        Shape("70b", 8192, 28672, 80, 64, 8, 128256),
    )
}
OPERATOR_SETS = {"small": ["110m", "1b"], "all": ["7b", "8b", "13b", "70b"]}
STEP_SETS = {"small": ["110m"], "all": ["7b", "8b"]}


def named(text: str, sets: dict[str, list[str]]) -> list[Shape]:
    """`small`, `all`, or names with commas between.

    Raises:
        ValueError: a name that is none.
    """
    names = [name for word in text.split(",") for name in sets.get(word, [word])]
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise ValueError(f"--shapes: got {unknown[0]!r}, expected {', '.join([*sets, *SHAPES])}, commas between")
    return [SHAPES[name] for name in dict.fromkeys(names)]
