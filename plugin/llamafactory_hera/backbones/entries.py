"""What the table of backbones holds of a model."""

from dataclasses import dataclass, field
from typing import Any

#: Embeddings are resized to a multiple of this, as the host does.
VOCABULARY_MULTIPLE = 64


def padded_vocabulary(rows: int, tokens: int) -> int:
    """Rows of an embedding of ``rows`` once it must hold ``tokens`` entries."""
    return rows if tokens <= rows else -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True)
class TextSizes:
    """Sizes of a text decoder.

    Attributes:
        model_type: Of its configuration.
        layers: Decoder layers.
        heads: Query heads a layer.
        kv_heads: Key-value heads a layer.
        head_dim: Values a head; not ``hidden / heads`` everywhere.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        vocabulary: Rows of the embedding.
        tied: Input and output embedding are one matrix.
        extra: Further entries of the configuration that change its parameters.
    """

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The entries of a text configuration."""
        return {
            "model_type": self.model_type,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            **self.extra,
        }


@dataclass(frozen=True)
class LanguageModel:
    """An LLM of the paper, from which a LLaVA-style model is assembled.

    Attributes:
        key: Its name in recipe files.
        title: Its name in text.
        checkpoint: Hub id.
        text: Its sizes.
        tokens: Entries of its tokenizer, before the image token.
        template: The host's template for stage 2.
        heads: The paper's heads.
        n_parameters: Of the LLM alone.
    """

    key: str
    title: str
    checkpoint: str
    text: TextSizes
    tokens: int
    template: str
    heads: str
    n_parameters: int

    def llava_config(self, vision: dict[str, Any]) -> dict[str, Any]:
        """The entries of the LLaVA configuration that `build` makes of it with a vision encoder without CLS token."""
        vocabulary = padded_vocabulary(self.text.vocabulary, self.tokens + 1)
        return {
            "text_config": self.text.config() | {"vocab_size": vocabulary},
            "vision_config": vision,
            "image_token_index": self.tokens,
            "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": self.text.tied,
        }


@dataclass(frozen=True)
class NativeModel:
    """A finished VLM.

    Attributes:
        key: Its name in recipe files.
        title: Its name in text.
        checkpoint: Hub id.
        model_type: Of its configuration.
        text: Sizes of its text decoder.
        template: The host's template.
        projector: Module that maps image features into the decoder, as `additional_target` names it.
        image_tokens: Tokens of an image at most, under the host's default pixel limits.
        n_parameters: Of the whole model.
        vision: Entries of its vision configuration.
        extra: Further entries of its configuration.
    """

    key: str
    title: str
    checkpoint: str
    model_type: str
    text: TextSizes
    template: str
    projector: str
    image_tokens: int
    n_parameters: int
    vision: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The entries of the whole configuration."""
        content: dict[str, Any] = {"text_config": self.text.config(), "tie_word_embeddings": self.text.tied}
        return content | ({"vision_config": self.vision} if self.vision else {}) | self.extra
